//! Debian's docker-registry on loopback, filled from OCI layouts with skopeo.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::wait;

/// A registry that runs as long as this value lives.
pub struct Registry {
    process: Child,
    folder: tempfile::TempDir,
    pub port: u16,
}

impl Registry {
    /// Starts an empty registry on a free port.
    pub fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let port = free_port()?;
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {root}}}\n  \
             delete: {{enabled: true}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n",
            root = folder.path().join("data").display(),
        );
        let file = folder.path().join("config.yml");
        std::fs::write(&file, config)?;
        let log = std::fs::File::create(folder.path().join("log"))?;
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting docker-registry (Debian package docker-registry)")?;
        let registry = Self { process, folder, port };
        wait::until("the registry listens", Duration::from_secs(30), || {
            Ok(std::net::TcpStream::connect(("127.0.0.1", port)).ok())
        })?;
        Ok(registry)
    }

    /// Pushes an OCI layout; its name on the registry.
    pub fn push(&self, layout: &Path, name: &str) -> Result<String> {
        let target = self.name(name);
        let output = Command::new("skopeo")
            .args(["copy", "--quiet", "--dest-tls-verify=false", "--insecure-policy"])
            .arg(format!("oci:{}", layout.display()))
            .arg(format!("docker://{target}"))
            .output()
            .context("running skopeo (Debian package skopeo)")?;
        ensure!(
            output.status.success(),
            "pushing {}: {}",
            layout.display(),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(target)
    }

    /// Reference of an image on this registry.
    pub fn name(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}", self.port)
    }

    /// Folder of the registry's blobs, for stories that damage them.
    pub fn data(&self) -> std::path::PathBuf {
        self.folder.path().join("data/docker/registry/v2")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have been killed by its story.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A TCP port that was free a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

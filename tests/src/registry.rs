//! Debian's docker-registry on loopback, filled from OCI layouts with skopeo.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{layout, wait};

/// A registry that runs as long as this value lives.
pub struct Registry {
    process: Child,
    folder: tempfile::TempDir,
    pub port: u16,
    auth: bool,
}

/// Credentials of a registry with authentication.
pub const USER: &str = "alice";
pub const PASSWORD: &str = "wonderland";
/// The same in htpasswd's format with bcrypt, the only hash that the registry accepts.
const HTPASSWD: &str = "alice:$2y$05$abcdefghijklmnopqrstuuA0vov2GDneHB3.8.cv9UF9g.RdvScIW\n";

impl Registry {
    /// Starts an empty registry on a free port.
    pub fn start() -> Result<Self> {
        Self::launch(false)
    }

    /// A registry that requires [`USER`] and [`PASSWORD`].
    pub fn with_auth() -> Result<Self> {
        Self::launch(true)
    }

    fn launch(auth: bool) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let port = free_port()?;
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {root}}}\n  \
             delete: {{enabled: true}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n",
            root = folder.path().join("data").display(),
        );
        if auth {
            let users = folder.path().join("htpasswd");
            std::fs::write(&users, HTPASSWD)?;
            config.push_str(&format!(
                "auth: {{htpasswd: {{realm: stories, path: {}}}}}\n",
                users.display()
            ));
        }
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
        let registry = Self { process, folder, port, auth };
        wait::until("the registry listens", Duration::from_secs(30), || {
            Ok(std::net::TcpStream::connect(("127.0.0.1", port)).ok())
        })?;
        Ok(registry)
    }

    /// Pushes an OCI layout; returns its reference.
    pub fn push(&self, layout: &Path, name: &str) -> Result<String> {
        let target = self.name(name);
        let credentials = format!("--dest-creds={USER}:{PASSWORD}");
        let output = Command::new("skopeo")
            .args(["copy", "--quiet", "--dest-tls-verify=false", "--insecure-policy"])
            .args(self.auth.then_some(credentials))
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

    /// Pushes OCI layouts of one image each, named by their directories, with one run of skopeo, as
    /// each run takes a second. Returns their references.
    pub fn push_all(&self, layouts: &[PathBuf]) -> Result<Vec<String>> {
        let top = tempfile::tempdir()?;
        let mut names = Vec::new();
        for layout in layouts {
            let name = layout.file_name().context("a layout is in a folder")?.to_string_lossy();
            layout::as_dir(layout, &top.path().join(&*name))?;
            names.push(self.name(&name));
        }
        let output = Command::new("skopeo")
            .args(["--insecure-policy", "sync", "--src=dir", "--dest=docker"])
            .arg("--dest-tls-verify=false")
            .arg(top.path())
            .arg(format!("127.0.0.1:{}", self.port))
            .output()
            .context("running skopeo (Debian package skopeo)")?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "pushing {} images: {stderr}", layouts.len());
        Ok(names)
    }

    /// Reference of an image on this registry.
    pub fn name(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}", self.port)
    }

    /// Directory of the registry's blobs, for stories that damage them.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data/docker/registry/v2")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // A story may have killed it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A TCP port that was free at the time of the call.
pub fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

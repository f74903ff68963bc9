//! `nacelle check`: what pods need from this host, and how to provide what is missing.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use nix::sys::statvfs::statvfs;

use super::arguments::{Check, Output};
use super::connect::Client;
use super::table;
use crate::api::{InfoReply, InfoRequest};
use crate::daemon::probe;
use crate::settings::{Overrides, Settings};

/// Free space for a few images and pods.
const MIN_FREE: u64 = 5 << 30;
/// The cgroup v2 controllers that limits need.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// The result of one check.
struct Finding {
    what: &'static str,
    ok: bool,
    text: String,
}

fn finding(what: &'static str, outcome: Result<String, String>) -> Finding {
    let ok = outcome.is_ok();
    Finding { what, ok, text: outcome.unwrap_or_else(|problem| problem) }
}

pub(super) async fn check(
    socket: Option<&Path>,
    options: Check,
    output: Output,
) -> Result<ExitCode> {
    let daemon = match Client::connect(socket).await {
        Ok(mut client) => client.debug.info(InfoRequest {}).await.ok().map(|r| r.into_inner()),
        Err(_) => None,
    };
    let settings = match &daemon {
        Some(info) => serde_json::from_str(&info.config)?,
        None => Settings::load(options.config.as_deref(), &Overrides::default())?,
    };
    let findings = [
        finding("KVM", kvm(&settings).await),
        finding("files", settings.missing_files().map_or(Ok(files(&settings)), Err)),
        finding("cgroup", cgroup(&settings)),
        finding("CNI", cni(&settings, daemon.as_ref()).await),
        finding("tun", tun()),
        finding("mkfs.ext4", mkfs()),
        finding("disk", disk(&settings.root)),
        finding(
            "nacelled",
            daemon.as_ref().map(running).ok_or_else(|| {
                "not running: systemctl start nacelled (until then, `nacelle run` starts a private \
                 one)"
                    .to_string()
            }),
        ),
    ];
    let ok = findings.iter().all(|finding| finding.ok);
    match output {
        Output::Json => {
            let list: Vec<serde_json::Value> = findings
                .iter()
                .map(|f| serde_json::json!({ "what": f.what, "ok": f.ok, "text": f.text }))
                .collect();
            table::json(&list.into())?;
        }
        Output::Table => {
            for finding in &findings {
                let mark = if finding.ok { "ok" } else { "NO" };
                crate::say(format_args!("{mark}  {:<10} {}", finding.what, finding.text))?;
            }
            let verdict = if ok { "This host can run pods." } else { "See the lines marked NO." };
            crate::say(format_args!("{verdict}"))?;
        }
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn kvm(settings: &Settings) -> Result<String, String> {
    let probe = probe(&settings.vmm).await?;
    let speed =
        format!("{:.0} million instructions/s, {:.1} us per exit", probe.mips, probe.exit_us);
    match probe.usable {
        true => Ok(speed),
        false if probe.mips > 0.0 => Err(format!("{} ({speed})", probe.why)),
        false => Err(probe.why),
    }
}

fn files(settings: &Settings) -> String {
    format!("{}, {}", settings.kernel.display(), settings.initramfs.display())
}

fn cgroup(settings: &Settings) -> Result<String, String> {
    let configured = Some(&settings.pods.cgroup_root).filter(|path| !path.as_os_str().is_empty());
    let candidates = ["/sys/fs/cgroup".into(), "/sys/fs/cgroup/unified".into()];
    let found = configured
        .into_iter()
        .chain(&candidates)
        .find_map(|root| std::fs::read_to_string(root.join("cgroup.controllers")).ok());
    let Some(controllers) = found else {
        return Err("version 2 is not mounted on /sys/fs/cgroup: boot with \
                    systemd.unified_cgroup_hierarchy=1"
            .into());
    };
    let has = |name: &&str| controllers.split_whitespace().any(|known| known == *name);
    let missing: Vec<&str> = CONTROLLERS.into_iter().filter(|name| !has(name)).collect();
    if missing.is_empty() {
        return Ok(format!("version 2 with {}", controllers.trim()));
    }
    Err(format!(
        "version 2 lacks {}: a version 1 hierarchy has them, or the kernel command line disables \
         them",
        missing.join(", ")
    ))
}

async fn cni(settings: &Settings, daemon: Option<&InfoReply>) -> Result<String, String> {
    let cni = network::Cni::new(settings.network.clone());
    let dir = settings.network.conf_dir.display();
    let (problem, summary) = if cni.is_configured().await {
        let problem = match daemon {
            Some(info) => Some(info.network_trouble.clone()).filter(|text| !text.is_empty()),
            None => cni.trouble().await,
        };
        (problem, format!("configured in {dir}"))
    } else {
        let summary = format!(
            "{dir} has no configuration: `nacelle run` uses the built-in network, a kubelet reports \
             the node as not ready"
        );
        (cni.default_trouble().await, summary)
    };
    problem.map_or(Ok(summary), Err)
}

fn tun() -> Result<String, String> {
    use std::os::unix::fs::FileTypeExt;
    match std::fs::metadata("/dev/net/tun") {
        Ok(metadata) if metadata.file_type().is_char_device() => Ok("/dev/net/tun".into()),
        _ => Err("/dev/net/tun does not exist: modprobe tun".into()),
    }
}

fn mkfs() -> Result<String, String> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    path.split(':')
        .map(|folder| Path::new(folder).join("mkfs.ext4"))
        .find(|program| program.is_file())
        .map(|program| program.display().to_string())
        .ok_or_else(|| "not found: apt install e2fsprogs".to_string())
}

fn disk(root: &Path) -> Result<String, String> {
    // The directory may not exist yet.
    let existing = root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let stat = statvfs(existing).map_err(|error| format!("{}: {error}", existing.display()))?;
    let free = stat.blocks_available() * stat.fragment_size();
    let text = format!("{} free for {}", table::bytes(free), root.display());
    if free >= MIN_FREE {
        Ok(text)
    } else {
        Err(format!("{text}; at least {} are needed", table::bytes(MIN_FREE)))
    }
}

fn running(info: &InfoReply) -> String {
    format!("version {}, process {}", info.version, info.pid)
}

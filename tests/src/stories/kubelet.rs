//! A pod with everything that a kubelet puts into it, in the order in which it does.

use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{container, mount, pod};
use crate::host;
use crate::node::Node;

pub const STORIES: &[Story] = &[(
    "a pod as a kubelet creates it: init container, then app, with all their mounts",
    kubelet_pod,
)];

fn kubelet_pod() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let folder = host::folder()?;
    let path = |name: &str| folder.path().join(name);
    fs::create_dir_all(path("config/..2025_01"))?;
    fs::write(path("config/..2025_01/color"), "red\n")?;
    symlink("..2025_01", path("config/..data"))?;
    symlink("..data/color", path("config/color"))?;
    fs::create_dir(path("empty"))?;
    fs::write(path("etc-hosts"), "127.0.0.1 localhost\n10.9.8.7 written-by-the-kubelet\n")?;
    for name in ["init-log", "app-log"] {
        fs::write(path(name), "")?;
    }
    let mounts = |log: &str| {
        vec![
            v1::Mount { readonly: true, ..mount(&path("config"), "/etc/config") },
            mount(&path("empty"), "/scratch"),
            mount(&path("etc-hosts"), "/etc/hosts"),
            mount(&path(log), "/dev/termination-log"),
        ]
    };
    let mut config = pod("kubelet", &node.logs);
    config.dns_config = Some(v1::DnsConfig {
        servers: vec!["10.96.0.10".into()],
        searches: vec!["stories.svc.cluster.local".into()],
        options: vec!["ndots:5".into()],
    });
    let cri = node.cri();
    let pod = cri.run_pod(config)?;
    let script = "cat /etc/config/color > /scratch/from-init && echo done > /dev/termination-log";
    let mut config = container("init", &image, &["sh", "-c", script]);
    config.mounts = mounts("init-log");
    let init = cri.run(&pod, config)?;
    let status = cri.exited(&init)?;
    ensure!(status.exit_code == 0, "{status:?} {:?}", cri.log(&init)?);
    ensure!(fs::read_to_string(path("init-log"))? == "done\n", "init's last words are lost");
    let script = "cat /scratch/from-init; grep -o written-by-the-kubelet /etc/hosts; hostname
        cat /etc/resolv.conf; echo x > /etc/config/color; printf bye > /dev/termination-log; exit 3";
    let mut config = container("app", &image, &["sh", "-c", script]);
    config.mounts = mounts("app-log");
    let app = cri.run(&pod, config)?;
    let status = cri.exited(&app)?;
    ensure!(status.exit_code == 3, "{status:?} {:?}", cri.log(&app)?);
    // A kubelet reads it as soon as it sees the end.
    ensure!(fs::read_to_string(path("app-log"))? == "bye", "the app's last words are lost");
    let log = cri.log(&app)?;
    let printed: Vec<&str> =
        log.iter().filter(|l| l.stream == "stdout").map(|l| l.text.as_str()).collect();
    ensure!(
        printed[..]
            == [
                "red",
                "written-by-the-kubelet",
                "kubelet",
                "search stories.svc.cluster.local",
                "nameserver 10.96.0.10",
                "options ndots:5",
            ],
        "{log:?}"
    );
    let refused = log.iter().any(|l| l.stream == "stderr" && l.text.contains("Read-only"));
    ensure!(refused, "a ConfigMap was written to: {log:?}");
    ensure!(fs::read_to_string(path("empty/from-init"))? == "red\n", "emptyDir on the host");
    node.finish()
}

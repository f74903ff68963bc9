//! Malformed requests, full disks, missing files.

use std::process::Command;

use anyhow::{Result, ensure};
use cri::v1;
use tonic::Code;

use super::Story;
use crate::client::{container, pod};
use crate::host::Tmpfs;
use crate::node::Node;

pub const STORIES: &[Story] = &[
    ("malformed requests get an error that names the field", malformed),
    ("a missing command is reported with the exit code that a kubelet expects", no_command),
    ("a full disk fails only what writes to it, with a clear error", full_disk),
    ("a checkpoint is rejected with an explanation", no_checkpoint),
    ("a missing guest kernel is reported with its path", no_kernel),
    ("a second daemon on the same directories exits with an error", second_daemon),
];

fn malformed() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    let status = cri.run_pod(v1::PodSandboxConfig::default()).unwrap_err();
    ensure!(
        status.code() == Code::InvalidArgument && status.message().contains("metadata"),
        "{status}"
    );
    let mut config = pod("bad", &node.logs);
    config.hostname = "x".repeat(300);
    let status = cri.run_pod(config).unwrap_err();
    ensure!(
        status.code() == Code::InvalidArgument && status.message().contains("hostname"),
        "{status}"
    );
    let id = node.pod("good")?;
    let status = cri.create(&id, v1::ContainerConfig::default()).unwrap_err();
    ensure!(status.code() == Code::InvalidArgument, "{status}");
    let status = cri.create(&id, container("c", "no-such-image", &["true"])).unwrap_err();
    ensure!(
        status.code() == Code::NotFound && status.message().contains("no-such-image"),
        "{status}"
    );
    let mut config = container("c", &image, &["true"]);
    config.log_path = "../../../../etc/escape".into();
    let status = cri.create(&id, config).unwrap_err();
    ensure!(
        status.code() == Code::InvalidArgument && status.message().contains("log_path"),
        "{status}"
    );
    ensure!(cri.containers()?.is_empty(), "a refused container is listed");
    node.finish()
}

fn no_command() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("command")?;
    let error = match node.cri().create(&pod, container("c", &image, &["/no/such/program"])) {
        Err(status) => status,
        Ok(id) => {
            let status = node.cri().start(&id).unwrap_err();
            let ended = node.cri().status(&id)?;
            ensure!(ended.state == v1::ContainerState::ContainerExited as i32, "{ended:?}");
            ensure!(ended.exit_code == 127 || ended.exit_code == 128, "{ended:?}");
            status
        }
    };
    ensure!(error.message().contains("/no/such/program"), "{error}");
    let fine = node.cri().run(&pod, container("fine", &image, &["true"]))?;
    ensure!(node.cri().exited(&fine)?.exit_code == 0, "the pod is affected");
    node.finish()
}

fn full_disk() -> Result<()> {
    let mut small = None;
    let node = Node::start_with(|config| {
        let line = config.lines().find(|l| l.starts_with("root = ")).unwrap_or_default();
        let root: std::path::PathBuf = line.trim_start_matches("root = ").trim_matches('"').into();
        small = Some(Tmpfs::mount(&root, "size=64m"));
        config
    })?;
    let _small = small.transpose()?;
    let image = node.image("busybox")?;
    let first = node.pod("first")?;
    let id = node.cri().run(&first, container("c", &image, &["sleep", "1000"]))?;
    let ballast = node.root.join("ballast");
    let output = Command::new("dd")
        .args(["if=/dev/zero", "bs=64k", &format!("of={}", ballast.display())])
        .output()?;
    ensure!(!output.status.success(), "the disk is not full");
    let status = node.cri().run_pod(pod("second", &node.logs)).unwrap_err();
    ensure!(status.message().to_lowercase().contains("space"), "{status}");
    let status = node.cri().pull(&crate::node::registry().name("busybox:latest"));
    if let Err(status) = status {
        ensure!(status.message().to_lowercase().contains("space"), "{status}");
    }
    ensure!(node.cri().shell(&id, "echo alive")? == "alive", "what ran is affected");
    ensure!(node.cri().pods()?.len() == 1, "a failed pod is listed");
    std::fs::remove_file(&ballast)?;
    let second = node.pod("second")?;
    ensure!(node.cri().pod_ready(&second)?, "with room again");
    node.finish()
}

fn no_checkpoint() -> Result<()> {
    let node = Node::start()?;
    let mut client = node.cri().runtime.clone();
    let request = v1::CheckpointContainerRequest::default();
    let outcome = node.cri().block_on(async move { client.checkpoint_container(request).await });
    let status = outcome.err().ok_or_else(|| anyhow::anyhow!("a checkpoint was taken"))?;
    ensure!(status.code() == Code::Unimplemented && status.message().len() > 20, "{status}");
    node.finish()
}

fn no_kernel() -> Result<()> {
    let node = Node::start_with(|config| config.replace("/vmlinux\"", "/no-such-kernel\""))?;
    let status = node.cri().run_pod(pod("none", &node.logs)).unwrap_err();
    ensure!(status.message().contains("no-such-kernel"), "{status}");
    ensure!(node.cri().pods()?.is_empty(), "a failed pod is listed");
    node.finish()
}

fn second_daemon() -> Result<()> {
    let node = Node::start()?;
    let output = Command::new(crate::node::bin("nacelled"))
        .env_remove("NACELLE_SOCKET")
        .arg("--config")
        .arg(node.path("config.toml"))
        .output()?;
    ensure!(!output.status.success(), "a second daemon serves the same folders");
    ensure!(node.cri().pods()?.is_empty(), "the first one is affected");
    node.finish()
}

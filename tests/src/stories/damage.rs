//! Stored files that are damaged while the daemon is down: it starts, reports what it could not
//! read, and keeps track of all that still runs.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::v1;
use tonic::Code;

use super::Story;
use crate::client::{container, pod};
use crate::node::Node;
use crate::wait;

pub const STORIES: &[Story] = &[
    ("a pod whose record cannot be read stays until it is stopped and removed", records),
    ("damaged images and refs.json do not prevent the daemon from starting", images),
    ("the address of a damaged network record is released when its pod is removed", networks),
];

fn damaged(node: &Node) -> Result<serde_json::Value> {
    let mut client = node.cri().runtime.clone();
    let request = v1::StatusRequest { verbose: true };
    let status = node.cri().block_on(async move { client.status(request).await })?.into_inner();
    Ok(serde_json::from_str(status.info.get("damaged").context("no key `damaged` in the status")?)?)
}

fn set_other_version(record: &Path) -> Result<()> {
    let mut value: serde_json::Value = serde_json::from_slice(&std::fs::read(record)?)?;
    value["version"] = 99.into();
    Ok(std::fs::write(record, value.to_string())?)
}

fn truncate(file: &Path) -> Result<()> {
    Ok(std::fs::write(file, "")?)
}

fn replace_by_directory(file: &Path) -> Result<()> {
    std::fs::remove_file(file)?;
    Ok(std::fs::create_dir(file)?)
}

const DAMAGES: [fn(&Path) -> Result<()>; 3] = [set_other_version, truncate, replace_by_directory];

fn records() -> Result<()> {
    let mut node = Node::start()?;
    let image = node.image("busybox")?;
    for damage in DAMAGES {
        let id = node.pod("damaged")?;
        node.cri().run(&id, container("c", &image, &["sleep", "1000"]))?;
        let (vmm, address) = (node.vmm_pid(&id)?, node.cri().pod_address(&id)?);
        let process = format!("/proc/{vmm}");
        node.kill_daemon()?;
        damage(&node.root.join("pods").join(&id).join("record.json"))?;
        node.start_daemon()?;

        let listed = node.cri().pods()?;
        ensure!(listed.len() == 1 && listed[0].id == id, "{listed:?}");
        ensure!(listed[0].state() == v1::PodSandboxState::SandboxNotready, "{listed:?}");
        let name = listed[0].metadata.clone().unwrap_or_default().name;
        ensure!(name == "damaged", "{listed:?}");
        ensure!(listed[0].annotations.contains_key("nacelle.dev/unread-record"), "{listed:?}");
        ensure!(node.cri().pod_address(&id)? == address, "its address is lost");
        ensure!(damaged(&node)?["pods"][0]["id"] == id.as_str(), "{}", damaged(&node)?);
        ensure!(Path::new(&process).exists(), "its VM was killed");
        let second = node.cri().run_pod(pod("damaged", &node.logs)).unwrap_err();
        ensure!(second.code() == Code::AlreadyExists, "{second}");

        node.cri().stop_pod(&id)?;
        wait::until("its VM has ended", Duration::from_secs(15), || {
            Ok((!Path::new(&process).exists()).then_some(()))
        })?;
        node.cri().remove_pod(&id)?;
        ensure!(node.cri().pods()?.is_empty(), "it is still listed");
        node.nothing_left()?;
    }
    node.finish()
}

fn images() -> Result<()> {
    let mut node = Node::start()?;
    let image = node.image("busybox")?;
    let id = node.pod("runs")?;
    let running = node.cri().run(&id, container("c", &image, &["sleep", "1000"]))?;
    let folder = node.root.join("images");
    let record = std::fs::read_dir(&folder)?
        .flatten()
        .map(|entry| entry.path().join("record.json"))
        .find(|path| path.exists())
        .context("no image is stored")?;
    for damage in DAMAGES {
        for file in [&record, &folder.join("refs.json")] {
            node.kill_daemon()?;
            damage(file)?;
            node.start_daemon()?;
            let damages = damaged(&node)?["images"].as_array().map_or(0, Vec::len);
            ensure!(damages > 0, "{}: {}", file.display(), damaged(&node)?);
            ensure!(node.cri().shell(&running, "echo alive")? == "alive", "what ran is affected");
            node.cri().pull(&image)?;
            let more = node.cri().run(&id, container("more", &image, &["true"]))?;
            ensure!(node.cri().exited(&more)?.exit_code == 0, "the image does not work");
            node.cri().remove(&more)?;
        }
    }
    node.finish()
}

fn networks() -> Result<()> {
    let mut node = Node::start()?;
    let id = node.pod("p")?;
    let cache = node.root.join("network/attachments").join(format!("{id}.json"));
    node.kill_daemon()?;
    replace_by_directory(&cache)?;
    node.start_daemon()?;
    ensure!(node.cri().pod_ready(&id)?, "the pod is lost");
    let damages = damaged(&node)?["networks"].as_array().map_or(0, Vec::len);
    ensure!(damages == 1, "{}", damaged(&node)?);
    node.cri().stop_pod(&id)?;
    node.cri().remove_pod(&id)?;
    ensure!(!cache.exists(), "the damaged record is still in its place");
    node.finish()
}

//! Images from a real registry, good and hostile.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use crate::client::container;
use crate::node::{self, Node};
use crate::wait;

pub const STORIES: &[Story] = &[
    ("an image is pulled by tag and by digest, listed, and removed", pull_list_remove),
    ("layers with whiteouts are merged", merged),
    ("an unknown image and an unreachable registry give different errors", not_there),
    ("a damaged blob is rejected by its digest", damaged_blob),
    ("hostile layers are rejected and leave nothing behind", hostile_layers),
    ("a container continues to run after its image is removed", removed_while_used),
    ("the usage of the image file system is reported", fs_info),
    ("a mirror in certs.d is used for its registry", mirror),
    ("credentials of a pull are sent to the registry", credentials),
    ("a pinned image is reported as pinned", pinned),
    ("concurrent pulls of one image give one image", pulled_twice_at_once),
];

fn list(node: &Node) -> Result<Vec<v1::Image>> {
    let mut client = node.cri().image.clone();
    let request = v1::ListImagesRequest::default();
    Ok(node.cri().block_on(async move { client.list_images(request).await })?.into_inner().images)
}

fn find(node: &Node, image: &str) -> Result<Option<v1::Image>> {
    let mut client = node.cri().image.clone();
    let image = Some(v1::ImageSpec { image: image.into(), ..Default::default() });
    let request = v1::ImageStatusRequest { image, verbose: false };
    Ok(node.cri().block_on(async move { client.image_status(request).await })?.into_inner().image)
}

fn remove(node: &Node, image: &str) -> Result<()> {
    let mut client = node.cri().image.clone();
    let image = Some(v1::ImageSpec { image: image.into(), ..Default::default() });
    let request = v1::RemoveImageRequest { image };
    node.cri().block_on(async move { client.remove_image(request).await })?;
    Ok(())
}

fn pull_list_remove() -> Result<()> {
    let node = Node::start()?;
    let name = node.image("busybox")?;
    let images = list(&node)?;
    ensure!(images.len() == 1, "{images:?}");
    let image = &images[0];
    ensure!(image.repo_tags == [name.clone()], "{:?}", image.repo_tags);
    ensure!(image.id.starts_with("sha256:") && image.size > 100_000, "{image:?}");
    let by_digest = image.repo_digests.first().context("no digest")?.clone();
    ensure!(find(&node, &by_digest)?.is_some(), "{by_digest} is not found");
    remove(&node, &name)?;
    ensure!(find(&node, &name)?.is_none(), "it is still there");
    remove(&node, &name)?;
    let id = node.cri().pull(&by_digest)?;
    ensure!(find(&node, &id)?.context("not found by id")?.id == image.id, "another image");
    let pod = node.pod("digest")?;
    let ran = node.cri().run(&pod, container("c", &by_digest, &["true"]))?;
    ensure!(node.cri().exited(&ran)?.exit_code == 0, "it does not run");
    node.finish()
}

fn merged() -> Result<()> {
    let node = Node::start()?;
    let pod = node.pod("merged")?;
    let image = node.image("nginx")?;
    let id = node.cri().run(&pod, container("c", &image, &["sleep", "1000"]))?;
    for gone in crate::images::WHITEOUTS {
        ensure!(node.cri().exec(&id, &["test", "-e", gone])?.code == 1, "{gone} is still there");
    }
    node.finish()
}

fn not_there() -> Result<()> {
    let node = Node::start()?;
    let unknown = node.cri().pull(&node::registry().name("no/such:image")).unwrap_err();
    ensure!(unknown.code() == tonic::Code::NotFound, "{unknown}");
    let port = crate::registry::free_port()?;
    let dead = node.cri().pull(&format!("127.0.0.1:{port}/a:b")).unwrap_err();
    ensure!(dead.code() != tonic::Code::NotFound, "{dead}");
    ensure!(dead.message().contains(&port.to_string()), "the address is not named: {dead}");
    let malformed = node.cri().pull("UPPER/Case:bad tag").unwrap_err();
    ensure!(malformed.code() == tonic::Code::InvalidArgument, "{malformed}");
    node.finish()
}

/// The largest blob of a registry's store.
fn largest(folder: &Path) -> Result<std::path::PathBuf> {
    let output = std::process::Command::new("find")
        .arg(folder)
        .args(["-type", "f", "-name", "data", "-printf", "%s %p\n"])
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .max_by_key(|(size, _)| size.parse::<u64>().unwrap_or(0))
        .map(|(_, path)| path.into())
        .context("no blob")
}

fn damaged_blob() -> Result<()> {
    let node = Node::start()?;
    // A separate registry, as its blobs are damaged.
    let registry = crate::registry::Registry::start()?;
    let name = registry.push(&crate::images::layout("busybox")?, "damaged:1")?;
    let blob = largest(&registry.data().join("blobs"))?;
    let mut bytes = std::fs::read(&blob)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(&blob, &bytes)?;
    let status = node.cri().pull(&name).unwrap_err();
    ensure!(status.message().contains("sha256"), "{status}");
    ensure!(list(&node)?.is_empty(), "a damaged image is listed");
    bytes[middle] ^= 0xff;
    bytes.truncate(middle);
    std::fs::write(&blob, &bytes)?;
    ensure!(node.cri().pull(&name).is_err(), "a truncated blob was taken");
    ensure!(list(&node)?.is_empty(), "a truncated image is listed");
    node.finish()
}

fn hostile_layers() -> Result<()> {
    let node = Node::start()?;
    let folder = tempfile::tempdir()?;
    for (what, layout) in crate::hostile::make(folder.path())? {
        let name = node::registry().push(&layout, &format!("hostile-{what}:1"))?;
        let outcome = node.cri().pull(&name);
        let Err(status) = outcome else { anyhow::bail!("{what}: it was taken") };
        ensure!(status.message().len() > 10, "{what}: {status}");
        ensure!(list(&node)?.is_empty(), "{what}: it is listed");
    }
    ensure!(!Path::new("/var/lib/nacelle-stories/escaped").exists(), "a layer wrote to the host");
    node.finish()
}

fn removed_while_used() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("used")?;
    let id = node.cri().run(&pod, container("c", &image, &["sleep", "1000"]))?;
    remove(&node, &image)?;
    node.cri().shell(&id, "cat /bin/busybox > /dev/null && ls /etc")?;
    node.finish()
}

fn fs_info() -> Result<()> {
    let node = Node::start()?;
    let used = || -> Result<u64> {
        let mut client = node.cri().image.clone();
        let request = v1::ImageFsInfoRequest {};
        let reply = node.cri().block_on(async move { client.image_fs_info(request).await })?;
        let reply = reply.into_inner();
        let all = reply.image_filesystems.first().context("no file system")?.clone();
        Ok(all.used_bytes.context("no size")?.value)
    };
    let before = used()?;
    let image = node.image("busybox")?;
    wait::until("an image counts", std::time::Duration::from_secs(10), || {
        Ok((used()? > before + 500_000).then_some(()))
    })?;
    remove(&node, &image)?;
    wait::until("its removal counts", std::time::Duration::from_secs(10), || {
        Ok((used()? < before + 500_000).then_some(()))
    })?;
    node.finish()
}

fn mirror() -> Result<()> {
    let certs = tempfile::tempdir()?;
    let name = node::registry().push(&crate::images::layout("busybox")?, "busybox:latest")?;
    let (address, _) = name.split_once('/').context("a registry")?;
    let folder = certs.path().join("registry.example");
    std::fs::create_dir(&folder)?;
    let hosts = format!(
        "server = \"https://registry.example\"\n\
         [host.\"http://{address}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
    );
    std::fs::write(folder.join("hosts.toml"), hosts)?;
    let path = certs.path().display().to_string();
    let node =
        Node::start_with(|config| format!("{config}\n[images]\nconfig_path = \"{path}\"\n"))?;
    node.cri().pull("registry.example/busybox:latest")?;
    let image = find(&node, "registry.example/busybox:latest")?.context("not found by its name")?;
    ensure!(image.repo_tags == ["registry.example/busybox:latest"], "{image:?}");
    node.finish()
}

fn credentials() -> Result<()> {
    use crate::registry::{PASSWORD, USER};
    let node = Node::start()?;
    let registry = crate::registry::Registry::with_auth()?;
    let name = registry.push(&crate::images::layout("busybox")?, "locked:1")?;
    let with = |password: &str| v1::AuthConfig {
        username: USER.into(),
        password: password.into(),
        ..Default::default()
    };
    for auth in [None, Some(with("guessed"))] {
        let status = node.cri().pull_as(&name, auth).unwrap_err();
        ensure!(status.message().contains("denies access"), "{status}");
        ensure!(!status.message().contains("guessed"), "the error contains the password: {status}");
    }
    node.cri().pull_as(&name, Some(with(PASSWORD)))?;
    ensure!(find(&node, &name)?.is_some(), "it is not there");
    node.finish()
}

fn pinned() -> Result<()> {
    let name = node::registry().name("busybox:latest");
    let node = Node::start_with(|config| format!("{config}\n[images]\npinned = [\"{name}\"]\n"))?;
    node.image("busybox")?;
    let image = find(&node, &name)?.context("not found")?;
    ensure!(image.pinned && list(&node)?.iter().all(|image| image.pinned), "{image:?}");
    node.finish()
}

fn pulled_twice_at_once() -> Result<()> {
    let node = Node::start()?;
    let name = node::registry().push(&crate::images::layout("redis")?, "redis:latest")?;
    std::thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| node.cri().pull(&name))).collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("thread"))??;
        }
        Ok(())
    })?;
    ensure!(list(&node)?.len() == 1, "{:?}", list(&node)?);
    node.finish()
}

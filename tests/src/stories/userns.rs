//! Pods with user namespaces (`hostUsers: false`).

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{container, mount, pod};
use crate::host;
use crate::node::Node;

pub const STORIES: &[Story] = &[(
    "a pod with a user namespace: its root is not the guest's root, but owns its volumes",
    mapped,
)];

const FIRST: u32 = 131_072;
const COUNT: u32 = 65_536;

fn ids() -> Vec<v1::IdMapping> {
    vec![v1::IdMapping { container_id: 0, host_id: FIRST, length: COUNT }]
}

fn own_users() -> Option<v1::NamespaceOption> {
    Some(v1::NamespaceOption {
        pid: v1::NamespaceMode::Container as i32,
        userns_options: Some(v1::UserNamespace {
            mode: v1::NamespaceMode::Pod as i32,
            uids: ids(),
            gids: ids(),
        }),
        ..Default::default()
    })
}

fn mapped() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    let mut client = cri.runtime.clone();
    let reply = cri.block_on(async move { client.status(v1::StatusRequest::default()).await })?;
    let handlers = reply.into_inner().runtime_handlers;
    let offered = handlers.iter().all(|h| h.features.is_some_and(|f| f.user_namespaces));
    ensure!(offered && !handlers.is_empty(), "a kubelet would reject such pods: {handlers:?}");

    let mut config = pod("users", &node.logs);
    config.linux.get_or_insert_default().security_context = Some(v1::LinuxSandboxSecurityContext {
        namespace_options: own_users(),
        ..Default::default()
    });
    let pod = cri.run_pod(config)?;
    let volume = host::folder()?;
    fs::write(volume.path().join("of-root"), "host\n")?;
    let mut config = container("c", &image, &["sleep", "1000"]);
    config.linux.get_or_insert_default().security_context =
        Some(v1::LinuxContainerSecurityContext {
            namespace_options: own_users(),
            ..Default::default()
        });
    config.mounts = vec![v1::Mount {
        uid_mappings: ids(),
        gid_mappings: ids(),
        ..mount(volume.path(), "/data")
    }];
    let refused = config.clone();
    let id = cri.run(&pod, config)?;
    let map = cri.shell(&id, "cat /proc/self/uid_map /proc/self/gid_map")?;
    let map: Vec<&str> = map.split_whitespace().collect();
    let (first, count) = (FIRST.to_string(), COUNT.to_string());
    ensure!(map == ["0", &first, &count, "0", &first, &count], "{map:?}");
    ensure!(cri.shell(&id, "id -u")? == "0", "it is not root in its namespace");
    ensure!(cri.shell(&id, "stat -c %u /etc/passwd")? == "0", "its image is not owned by its root");
    let sysctl = "/proc/sys/vm/swappiness";
    ensure!(cri.shell(&id, &format!("stat -c %u {sysctl}"))? == "65534", "it is the guest's root");
    let write = cri.exec(&id, &["sh", "-c", &format!("echo 1 > {sysctl}")])?;
    ensure!(write.code != 0, "it can write a sysctl of the guest");

    cri.shell(&id, "cat /data/of-root && echo x > /data/of-root && touch /data/made")?;
    cri.shell(&id, "touch /data/given && chown 1000:1001 /data/given")?;
    let owner = |name: &str| {
        let found = fs::metadata(volume.path().join(name)).with_context(|| name.to_owned())?;
        Ok::<_, anyhow::Error>((found.uid(), found.gid()))
    };
    ensure!(owner("made")? == (0, 0), "on the host it belongs to {:?}", owner("made")?);
    ensure!(owner("given")? == (1000, 1001), "on the host it belongs to {:?}", owner("given")?);

    let mut other = refused;
    other.metadata = Some(v1::ContainerMetadata { name: "other".into(), attempt: 0 });
    other.mounts.clear();
    other.linux.get_or_insert_default().security_context = None;
    let status = cri.create(&pod, other).unwrap_err();
    ensure!(status.message().contains("userns_options"), "{status}");
    node.finish()
}

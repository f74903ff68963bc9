//! Users, capabilities, file system protections, seccomp.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{Cri, container};
use crate::node::Node;
use crate::wait;

pub const STORIES: &[Story] = &[
    ("a container runs with the requested user and groups", users),
    ("groups of the image are merged according to the policy", groups),
    ("a container has the requested capabilities and no others", capabilities),
    ("protected paths are masked or read-only", protected_paths),
    ("a read-only root file system rejects writes", read_only_root),
    ("the default seccomp profile is applied", seccomp),
    ("no_new_privs is set on request", no_new_privs),
    (
        "an AppArmor profile loaded on the host confines init and execs, with and without a VM",
        apparmor,
    ),
    ("a privileged container can mount in the guest", privileged),
    ("unsupported requests are rejected with a reason", refused),
];

fn secured(
    name: &str,
    image: &str,
    context: v1::LinuxContainerSecurityContext,
) -> v1::ContainerConfig {
    let mut config = container(name, image, &["sleep", "1000"]);
    config.linux.get_or_insert_default().security_context = Some(context);
    config
}

fn value(n: i64) -> Option<v1::Int64Value> {
    Some(v1::Int64Value { value: n })
}

fn users() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("users")?;
    let cri = node.cri();
    let context = v1::LinuxContainerSecurityContext {
        run_as_user: value(1234),
        run_as_group: value(2345),
        supplemental_groups: vec![3456],
        ..Default::default()
    };
    let id = cri.run(&pod, secured("numbers", &image, context))?;
    let status = cri.shell(&id, "grep -E '^(Uid|Gid|Groups)' /proc/1/status")?;
    ensure!(status.contains("Uid:\t1234\t1234") && status.contains("Gid:\t2345\t2345"), "{status}");
    ensure!(status.lines().any(|l| l.starts_with("Groups:") && l.contains("3456")), "{status}");
    ensure!(cri.shell(&id, "id -u")? == "1234", "exec runs as another user");
    let context = v1::LinuxContainerSecurityContext {
        run_as_username: "www-data".into(),
        ..Default::default()
    };
    let id = cri.run(&pod, secured("name", &image, context))?;
    ensure!(cri.shell(&id, "id -u; id -g")? == "33\n33", "www-data is not 33");
    let context = v1::LinuxContainerSecurityContext {
        run_as_username: "nobody-knows".into(),
        ..Default::default()
    };
    let outcome = cri.run(&pod, secured("unknown", &image, context));
    let error = format!("{:#}", outcome.err().ok_or_else(|| anyhow::anyhow!("it ran"))?);
    ensure!(error.contains("nobody-knows"), "the error does not name the user: {error}");
    node.finish()
}

fn groups() -> Result<()> {
    let node = Node::start()?;
    let folder = tempfile::tempdir()?;
    let files = [
        ("etc/passwd", "root:x:0:0::/:/bin/sh\nana:x:1500:1500::/:/bin/sh\n"),
        ("etc/group", "root:x:0:\nana:x:1500:\ncrew:x:2000:ana\nothers:x:2001:root\n"),
    ];
    let layout = crate::images::with_files("busybox", folder.path(), &files)?;
    let image = crate::node::registry().push(&layout, "groups:latest")?;
    node.cri().pull(&image)?;
    let pod = node.pod("groups")?;
    let cri = node.cri();
    for (name, policy, expected) in [
        ("merge", v1::SupplementalGroupsPolicy::Merge, vec![1500, 2000, 3000]),
        ("strict", v1::SupplementalGroupsPolicy::Strict, vec![1500, 3000]),
    ] {
        let context = v1::LinuxContainerSecurityContext {
            run_as_user: value(1500),
            run_as_group: value(1500),
            supplemental_groups: vec![3000],
            supplemental_groups_policy: policy as i32,
            ..Default::default()
        };
        let id = cri.run(&pod, secured(name, &image, context))?;
        let sorted = |mut groups: Vec<i64>| {
            groups.sort_unstable();
            groups.dedup();
            groups
        };
        let found = cri.shell(&id, "id -G")?;
        let found = found.split(' ').map(str::parse).collect::<Result<Vec<i64>, _>>()?;
        ensure!(sorted(found.clone()) == expected, "{name}: {found:?} found");
        let user = cri.status(&id)?.user.and_then(|user| user.linux);
        let user = user.ok_or_else(|| anyhow::anyhow!("{name}: its status tells no user"))?;
        ensure!((user.uid, user.gid) == (1500, 1500), "{name}: {user:?}");
        let mut reported = user.supplemental_groups.clone();
        reported.push(user.gid);
        ensure!(sorted(reported) == expected, "{name}: {user:?} is reported");
    }
    node.finish()
}

fn capabilities() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("caps")?;
    let cri = node.cri();
    let with = |add: &[&str], drop: &[&str]| v1::LinuxContainerSecurityContext {
        capabilities: Some(v1::Capability {
            add_capabilities: add.iter().map(ToString::to_string).collect(),
            drop_capabilities: drop.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let effective = |id: &str| cri.shell(id, "grep CapEff /proc/1/status | cut -f2");
    let usual = cri.run(&pod, secured("usual", &image, with(&[], &[])))?;
    ensure!(effective(&usual)? == "00000000a80425fb", "default set {}", effective(&usual)?);
    let none = cri.run(&pod, secured("none", &image, with(&[], &["ALL"])))?;
    ensure!(effective(&none)? == "0000000000000000", "{}", effective(&none)?);
    ensure!(cri.exec(&none, &["chown", "1", "/etc"])?.code != 0, "chown without CAP_CHOWN");
    let admin = cri.run(&pod, secured("admin", &image, with(&["NET_ADMIN"], &[])))?;
    ensure!(effective(&admin)? == "00000000a80435fb", "{}", effective(&admin)?);
    ensure!(cri.exec(&usual, &["ip", "link", "set", "lo", "down"])?.code != 0, "no NET_ADMIN");
    cri.shell(&admin, "ip link add d0 type dummy && ip link del d0")?;
    node.finish()
}

fn protected_paths() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("paths")?;
    let cri = node.cri();
    let context = v1::LinuxContainerSecurityContext {
        masked_paths: vec!["/proc/kcore".into(), "/proc/keys".into(), "/sys/firmware".into()],
        readonly_paths: vec!["/proc/sys".into()],
        ..Default::default()
    };
    let id = cri.run(&pod, secured("c", &image, context))?;
    ensure!(cri.shell(&id, "wc -c < /proc/keys")? == "0", "/proc/keys is not masked");
    let write = cri.exec(&id, &["sh", "-c", "echo 1 > /proc/sys/vm/swappiness"])?;
    ensure!(write.code != 0, "/proc/sys is writable");
    ensure!(cri.exec(&id, &["touch", "/sys/kernel/x"])?.code != 0, "/sys is writable");
    node.finish()
}

fn read_only_root() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("ro")?;
    let context = v1::LinuxContainerSecurityContext { readonly_rootfs: true, ..Default::default() };
    let id = node.cri().run(&pod, secured("c", &image, context))?;
    let write = node.cri().exec(&id, &["touch", "/x"])?;
    ensure!(write.code != 0 && write.stderr.contains("Read-only"), "{write:?}");
    node.cri().shell(&id, "echo > /dev/null && touch /dev/shm/x")?;
    node.finish()
}

fn seccomp() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("seccomp")?;
    let cri = node.cri();
    let profile = |kind: v1::security_profile::ProfileType| v1::LinuxContainerSecurityContext {
        seccomp: Some(v1::SecurityProfile {
            profile_type: kind as i32,
            localhost_ref: String::new(),
        }),
        ..Default::default()
    };
    let mode = |id: &str| cri.shell(id, "grep ^Seccomp: /proc/1/status | cut -f2");
    let usual = profile(v1::security_profile::ProfileType::RuntimeDefault);
    let id = cri.run(&pod, secured("default", &image, usual))?;
    ensure!(mode(&id)? == "2", "no filter: mode {}", mode(&id)?);
    ensure!(cri.exec(&id, &["unshare", "-U", "true"])?.code != 0, "a user namespace was made");
    let free = profile(v1::security_profile::ProfileType::Unconfined);
    let id = cri.run(&pod, secured("unconfined", &image, free))?;
    ensure!(mode(&id)? == "0", "a filter in an unconfined container");
    node.finish()
}

fn no_new_privs() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("nnp")?;
    let cri = node.cri();
    let flag = |id: &str| cri.shell(id, "grep NoNewPrivs /proc/1/status | cut -f2");
    let context = v1::LinuxContainerSecurityContext { no_new_privs: true, ..Default::default() };
    let id = cri.run(&pod, secured("set", &image, context))?;
    ensure!(flag(&id)? == "1", "no_new_privs is not set");
    let id =
        cri.run(&pod, secured("unset", &image, v1::LinuxContainerSecurityContext::default()))?;
    ensure!(flag(&id)? == "0", "no_new_privs is set without being asked");
    node.finish()
}

/// An AppArmor profile with a child profile, loaded on the host; unloaded on drop.
struct Profile {
    name: String,
}

impl Profile {
    /// The profile denies all writes, its child allows them.
    fn load() -> Result<Self> {
        let profile = Self { name: format!("nacelle-story-{}", std::process::id()) };
        profile.parser("--replace")?;
        Ok(profile)
    }

    fn child(&self) -> String {
        format!("{}//child", self.name)
    }

    fn parser(&self, action: &str) -> Result<()> {
        let flags = "flags=(attach_disconnected)";
        let text = format!(
            "profile {} {flags} {{\n file,\n capability,\n signal,\n deny /** w,\n profile child \
             {flags} {{\n file,\n signal,\n }}\n}}\n",
            self.name
        );
        let mut parser = Command::new("apparmor_parser")
            .args([action, "--skip-cache"])
            .stdin(Stdio::piped())
            .spawn()
            .context("apparmor_parser")?;
        parser.stdin.take().context("its input")?.write_all(text.as_bytes())?;
        ensure!(parser.wait()?.success(), "apparmor_parser {action}");
        Ok(())
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        let _ = self.parser("--remove");
    }
}

fn apparmor() -> Result<()> {
    let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    if !enabled.is_ok_and(|enabled| enabled.starts_with('Y')) {
        println!("SKIP: this host's kernel runs without AppArmor");
        return Ok(());
    }
    if !Path::new("/sbin/apparmor_parser").exists() {
        println!("SKIP: no apparmor_parser on this host");
        return Ok(());
    }
    let profile = Profile::load()?;
    let policy = "\n[cri.host_pods]\nenabled = true\nnamespaces = [\"stories\"]\n";
    let node = Node::start_with(|config| config + policy)?;
    let image = node.image("busybox")?;
    let pod = node.pod("apparmor")?;
    check_profile(node.cri(), &pod, &image, &profile)?;
    let mut config = crate::client::pod("apparmor-host", &node.logs);
    config.linux.get_or_insert_default().security_context = Some(v1::LinuxSandboxSecurityContext {
        namespace_options: Some(v1::NamespaceOption {
            ipc: v1::NamespaceMode::Node as i32,
            ..Default::default()
        }),
        ..Default::default()
    });
    let of_host = node.cri().run_pod(config)?;
    check_profile(node.cri(), &of_host, &image, &profile)?;
    node.finish()
}

fn check_profile(cri: &Cri, pod: &str, image: &str, profile: &Profile) -> Result<()> {
    let under = |name: &str, profile: &str| {
        let line = "touch /by-init; exec sleep 1000";
        let mut config = container(name, image, &["sh", "-c", line]);
        config.linux.get_or_insert_default().security_context =
            Some(v1::LinuxContainerSecurityContext {
                apparmor: Some(v1::SecurityProfile {
                    profile_type: v1::security_profile::ProfileType::Localhost as i32,
                    localhost_ref: format!("localhost/{profile}"),
                }),
                ..Default::default()
            });
        config
    };
    let enforced = |name: &str| format!("{name} (enforce)");
    let id = cri.run(pod, under("denied", &profile.name))?;
    wait::until("the init's program runs", Duration::from_secs(10), || {
        Ok(cri.shell(&id, "cat /proc/1/cmdline")?.starts_with("sleep").then_some(()))
    })?;
    ensure!(cri.shell(&id, "cat /proc/1/attr/current")? == enforced(&profile.name), "its init");
    ensure!(cri.shell(&id, "cat /proc/self/attr/current")? == enforced(&profile.name), "an exec");
    ensure!(cri.exec(&id, &["test", "-e", "/by-init"])?.code != 0, "the init could write");
    let write = cri.exec(&id, &["touch", "/by-exec"])?;
    ensure!(write.code != 0 && write.stderr.contains("Permission denied"), "{write:?}");

    let id = cri.run(pod, under("allowed", &profile.child()))?;
    ensure!(cri.shell(&id, "cat /proc/1/attr/current")? == enforced(&profile.child()), "a child");
    cri.shell(&id, "touch /by-exec")?;

    let refusal = cri.create(pod, under("unknown", "nacelle-no-such-profile")).unwrap_err();
    let sentence = "no profile \"nacelle-no-such-profile\" is loaded on this host";
    ensure!(refusal.message().contains(sentence), "{refusal}");
    Ok(())
}

fn privileged() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let mut config = crate::client::pod("privileged", &node.logs);
    config.linux.get_or_insert_default().security_context =
        Some(v1::LinuxSandboxSecurityContext { privileged: true, ..Default::default() });
    let pod = node.cri().run_pod(config)?;
    let context = v1::LinuxContainerSecurityContext { privileged: true, ..Default::default() };
    let id = node.cri().run(&pod, secured("c", &image, context))?;
    node.cri().shell(&id, "mkdir /m && mount -t tmpfs none /m && touch /m/x && umount /m")?;
    node.cri().shell(&id, "echo 10 > /proc/sys/vm/swappiness")?;
    node.finish()
}

fn refused() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let mut config = crate::client::pod("hostnet", &node.logs);
    config.linux.get_or_insert_default().security_context = Some(v1::LinuxSandboxSecurityContext {
        namespace_options: Some(v1::NamespaceOption {
            network: v1::NamespaceMode::Node as i32,
            ..Default::default()
        }),
        ..Default::default()
    });
    let status = node.cri().run_pod(config).unwrap_err();
    ensure!(status.message().to_lowercase().contains("network"), "{status}");
    let pod = node.pod("refused")?;
    let socket = node.socket();
    let mut with_socket = container("socket", &image, &["true"]);
    with_socket.mounts = vec![crate::client::mount(&socket, "/run/daemon.sock")];
    let mut with_profile = container("profile", &image, &["true"]);
    with_profile.linux.get_or_insert_default().security_context =
        Some(v1::LinuxContainerSecurityContext {
            apparmor: Some(v1::SecurityProfile {
                profile_type: v1::security_profile::ProfileType::Localhost as i32,
                localhost_ref: "no-such-profile".into(),
            }),
            ..Default::default()
        });
    for (config, reason) in [(with_socket, "a socket"), (with_profile, "apparmor")] {
        let status = node.cri().create(&pod, config).unwrap_err();
        ensure!(status.message().contains(reason), "{status}");
    }
    node.finish()
}

//! `-info`: prints a RuntimeInfo (containerd 2.0 and later). Its OCI features (runtime-spec, features.md)
//! are those of the guest: its kernel, its agent and this shim, not those of the host.

use std::io::{IsTerminal, Read, Write};

use anyhow::{Context, Result};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use serde_json::{Value, json};

/// Maximum size of the runtime options on standard input, bytes.
const MAX_INPUT: u64 = 1 << 20;
/// containerd's typeurl of OCI features; the value is JSON.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

pub(crate) fn info() -> Result<()> {
    let mut input = Vec::new();
    if !std::io::stdin().is_terminal() {
        std::io::stdin().take(MAX_INPUT).read_to_end(&mut input).context("reading the options")?;
    }
    std::io::stdout().write_all(&runtime_info(&input)?.write_to_bytes()?)?;
    Ok(())
}

/// `input`: runtime options as an `Any`, or nothing.
fn runtime_info(input: &[u8]) -> Result<RuntimeInfo> {
    let options = match input {
        [] => None,
        input => Some(Any::parse_from_bytes(input).context("parsing the runtime options")?),
    };
    let features = Any {
        type_url: FEATURES_TYPE.to_owned(),
        value: serde_json::to_vec(&features())?,
        ..Default::default()
    };
    Ok(RuntimeInfo {
        name: crate::runtime::RUNTIME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        options: options.into(),
        features: MessageField::some(features),
        // `containerd.io/runtime-allow-mounts` is not set: containerd must mount images and format
        // file systems itself.
        ..Default::default()
    })
}

fn features() -> Value {
    json!({
        // The agent accepts specifications of version 1.
        "ociVersionMin": "1.0.0",
        "ociVersionMax": oci_spec::runtime::VERSION,
        // Hooks are refused.
        "hooks": [],
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "noatime",
            "nodev", "nodiratime", "noexec", "norelatime", "nostrictatime", "nosuid", "private",
            "rbind", "relatime", "ro", "rprivate", "rro", "rslave", "rw", "slave", "strictatime",
            "suid", "sync",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "capabilities": [
                "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID",
                "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE",
                "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW",
                "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO",
                "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN",
                "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
                "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE",
                "CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN",
                "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ",
                "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
            ],
            // The guest has cgroup v2 and no systemd.
            "cgroup": {
                "v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false,
            },
            "seccomp": {
                "enabled": true,
                // Without SCMP_ACT_NOTIFY, which is refused.
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE",
                ],
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                "knownFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
                    "SECCOMP_FILTER_FLAG_TSYNC",
                ],
                "supportedFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
                    "SECCOMP_FILTER_FLAG_TSYNC",
                ],
            },
            "apparmor": { "enabled": true },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": false } },
            "netDevices": { "enabled": false },
        },
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{Features, LinuxSeccompAction};

    use super::*;

    #[test]
    fn the_features_are_those_of_the_guest() {
        let info = runtime_info(b"").unwrap();
        assert_eq!(info.name, "io.containerd.nacelle.v2");
        assert!(info.options.is_none() && !info.version.version.is_empty());
        assert_eq!(info.features.type_url, FEATURES_TYPE);
        // All names are those of the specification.
        let features: Features = serde_json::from_slice(&info.features.value).unwrap();
        assert!(features.hooks().as_ref().unwrap().is_empty());
        let linux = features.linux().as_ref().unwrap();
        let cgroup = linux.cgroup().as_ref().unwrap();
        assert_eq!((*cgroup.v1(), *cgroup.v2()), (Some(false), Some(true)));
        let seccomp = linux.seccomp().as_ref().unwrap();
        let actions = seccomp.actions().as_ref().unwrap();
        assert!(!actions.contains(&LinuxSeccompAction::ScmpActNotify));
        let extensions = linux.mount_extensions().as_ref().unwrap();
        assert_eq!(*extensions.idmap().as_ref().unwrap().enabled(), Some(false));
        for capability in linux.capabilities().as_ref().unwrap() {
            let parsed: Result<oci_spec::runtime::Capability, _> =
                serde_json::from_value(json!(capability));
            assert!(parsed.is_ok(), "{capability}");
        }
    }

    #[test]
    fn runtime_options_are_returned_and_other_input_is_refused() {
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"\x0a\x01x".to_vec(),
            ..Default::default()
        };
        let info = runtime_info(&options.write_to_bytes().unwrap()).unwrap();
        assert_eq!(info.options.as_ref(), Some(&options));
        assert!(runtime_info(b"\xff\xff no message").is_err());
    }
}

//! The end-to-end tests ("stories"): each is a function that checks one property for users.

mod agent;
mod damage;
mod devices;
mod empty_dir;
mod engines;
mod events;
mod exec;
mod failures;
mod guest_kernel;
mod host_pods;
mod images;
mod kills;
mod kubelet;
mod life_cycle;
mod limits;
mod logs;
mod memory;
mod metrics;
mod network;
mod programs;
mod reboot;
mod security;
mod shared_volumes;
mod shim;
mod streaming;
mod templates;
mod tool;
mod userns;
mod vmm;
mod volumes;
mod workloads;

/// A story's name (a sentence) and its function.
pub type Story = (&'static str, fn() -> anyhow::Result<()>);

/// Stories that need several CPUs, by area and name.
pub const WIDE: &[(&str, &str)] = &[
    ("limits", "CPUs and memory are added to a running pod and removed again"),
    ("limits", "a pod runs on the host's CPUs of its containers' cpusets"),
];

/// Ignored unless asked for (`--ignored`, `--include-ignored`): stories that take many minutes, or that need
/// a later containerd than that of Debian 12.
pub const IGNORED: &[(&str, &str)] = &[
    ("shim", shim::CRI_POD_OF_SANDBOX_SERVICE),
    ("shim", shim::KILLED_SHIM_OF_SANDBOX_SERVICE),
    ("shim", shim::RESTART_WITH_SANDBOX_SERVICE),
    ("devices", "a pod can have many containers with different images, and they can be removed"),
    (
        "engines",
        "docker in a pod uses overlay2 in any data directory, pulls, builds, limits, publishes",
    ),
    ("engines", "podman in a pod builds an image and runs containers of it"),
];

/// All stories, basic ones first.
pub fn all() -> Vec<(&'static str, Story)> {
    let areas: &'static [(&'static str, &'static [Story])] = &[
        ("vmm", vmm::STORIES),
        ("templates", templates::STORIES),
        ("life_cycle", life_cycle::STORIES),
        ("exec", exec::STORIES),
        ("streaming", streaming::STORIES),
        ("logs", logs::STORIES),
        ("limits", limits::STORIES),
        ("memory", memory::STORIES),
        ("events", events::STORIES),
        ("metrics", metrics::STORIES),
        ("security", security::STORIES),
        ("devices", devices::STORIES),
        ("userns", userns::STORIES),
        ("volumes", volumes::STORIES),
        ("shared_volumes", shared_volumes::STORIES),
        ("empty_dir", empty_dir::STORIES),
        ("engines", engines::STORIES),
        ("workloads", workloads::STORIES),
        ("host_pods", host_pods::STORIES),
        ("kubelet", kubelet::STORIES),
        ("network", network::STORIES),
        ("images", images::STORIES),
        ("kills", kills::STORIES),
        ("failures", failures::STORIES),
        ("damage", damage::STORIES),
        ("programs", programs::STORIES),
        ("reboot", reboot::STORIES),
        ("guest_kernel", guest_kernel::STORIES),
        ("tool", tool::STORIES),
        ("agent", agent::STORIES),
        ("shim", shim::STORIES),
    ];
    areas.iter().flat_map(|(area, stories)| stories.iter().map(move |s| (*area, *s))).collect()
}

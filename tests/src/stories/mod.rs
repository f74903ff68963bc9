//! The stories: each is a function that tells one thing a user relies on, and fails if it is not so.

mod agent;
mod damage;
mod devices;
mod empty_dir;
mod engines;
mod events;
mod exec;
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
mod tool;
mod trouble;
mod userns;
mod vmm;
mod volumes;
mod workloads;

/// A story's name (a sentence) and what it does.
pub type Story = (&'static str, fn() -> anyhow::Result<()>);

/// Stories that need several CPUs, by room and name.
pub const WIDE: &[(&str, &str)] = &[
    ("limits", "a pod gets a further CPU and memory while it runs, and gives them back"),
    ("limits", "a pod runs on the host's CPUs that a kubelet gave its containers"),
];

/// Stories that take many minutes: ignored unless asked for (`--ignored`, `--include-ignored`).
pub const SLOW: &[(&str, &str)] = &[
    ("devices", "many containers with images of their own fit into a pod, and leave it again"),
    (
        "engines",
        "docker in a pod has overlay2 wherever its data is, pulls, builds, limits, publishes",
    ),
    ("engines", "podman in a pod builds an image and runs containers of it"),
];

/// Every story, those that others build on first.
pub fn all() -> Vec<(&'static str, Story)> {
    let rooms: &'static [(&'static str, &'static [Story])] = &[
        ("vmm", vmm::STORIES),
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
        ("trouble", trouble::STORIES),
        ("damage", damage::STORIES),
        ("programs", programs::STORIES),
        ("reboot", reboot::STORIES),
        ("guest_kernel", guest_kernel::STORIES),
        ("tool", tool::STORIES),
        ("agent", agent::STORIES),
        ("shim", shim::STORIES),
    ];
    rooms.iter().flat_map(|(room, stories)| stories.iter().map(move |s| (*room, *s))).collect()
}

//! The stories: each is a function that tells one thing a user relies on, and fails if it is not so.

mod exec;
mod images;
mod kills;
mod life_cycle;
mod limits;
mod logs;
mod network;
mod programs;
mod security;
mod tool;
mod trouble;
mod vmm;

/// A story's name (a sentence) and what it does.
pub type Story = (&'static str, fn() -> anyhow::Result<()>);

/// Every story, those that others build on first.
pub fn all() -> Vec<(&'static str, Story)> {
    let rooms: [(&'static str, &[Story]); 12] = [
        ("vmm", vmm::STORIES),
        ("life_cycle", life_cycle::STORIES),
        ("exec", exec::STORIES),
        ("logs", logs::STORIES),
        ("limits", limits::STORIES),
        ("security", security::STORIES),
        ("network", network::STORIES),
        ("images", images::STORIES),
        ("kills", kills::STORIES),
        ("trouble", trouble::STORIES),
        ("programs", programs::STORIES),
        ("tool", tool::STORIES),
    ];
    rooms.into_iter().flat_map(|(room, stories)| stories.iter().map(move |s| (room, *s))).collect()
}

//! Shards: the stories of one run, so that they can be divided among several labs.

use crate::stories::{IGNORED, Story, WIDE};

/// Seconds that the long stories took on two CPUs, by a prefix of their full name. Used only to
/// make the shards about equally long.
const LONG: &[(&str, u32)] = &[
    ("agent::", 150),
    ("damage::a pod", 90),
    ("damage::damaged images", 50),
    ("devices::a container has runc's", 90),
    ("empty_dir::", 60),
    ("guest_kernel::", 90),
    ("kills::a daemon killed at any phase of a pod's", 100),
    ("life_cycle::pods created and removed", 80),
    ("limits::a container over its memory", 60),
    ("limits::huge pages", 60),
    ("memory::", 60),
    ("programs::postgres", 120),
    ("programs::python", 60),
    ("reboot::", 50),
    ("shared_volumes::", 90),
    ("shim::a pod of containerd's CRI", 45),
    ("shim::ctr", 130),
    ("streaming::exec transfers eight", 50),
    ("tool::nacelle run", 50),
    ("volumes::a ConfigMap", 60),
    ("volumes::a VOLUME", 60),
    ("volumes::a directory of the host", 60),
    ("volumes::a pod survives", 60),
    ("workloads::", 100),
];
/// Seconds of every other story.
const USUAL: u32 = 20;

fn seconds(area: &str, name: &str) -> u32 {
    if IGNORED.contains(&(area, name)) {
        return 0; // Ignored by default.
    }
    let full = format!("{area}::{name}");
    LONG.iter().find(|(beginning, _)| full.starts_with(beginning)).map_or(USUAL, |each| each.1)
}

/// A subset of the stories; all `Nth` with the same `of`, and `Wide`, are all stories together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shard {
    All,
    /// Shard `at` (from 0) of `of`, of the stories that need one CPU.
    Nth {
        at: usize,
        of: usize,
    },
    Wide,
}

impl Shard {
    /// `wide`, or like `1/2`.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "wide" {
            return Some(Self::Wide);
        }
        let (at, of) = text.split_once('/')?;
        let (at, of) = (at.parse::<usize>().ok()?.checked_sub(1)?, of.parse().ok()?);
        (at < of).then_some(Self::Nth { at, of })
    }

    /// The stories of `all` in this shard, by area.
    pub fn of(self, all: Vec<(&'static str, Story)>) -> Vec<(&'static str, Story)> {
        let wide = |story: &(&str, Story)| WIDE.contains(&(story.0, story.1.0));
        match self {
            Self::All => all,
            Self::Wide => all.into_iter().filter(wide).collect(),
            Self::Nth { at, of } => {
                // The longest first, each to the shard that is shortest so far.
                let narrow: Vec<_> = all.into_iter().filter(|story| !wide(story)).collect();
                let weight = |n: &usize| {
                    let (area, (name, _)) = narrow[*n];
                    seconds(area, name)
                };
                let mut order: Vec<usize> = (0..narrow.len()).collect();
                order.sort_by_key(|n| std::cmp::Reverse(weight(n)));
                let (mut shares, mut own) = (vec![0; of], Vec::new());
                for n in order {
                    let Some(share) = (0..of).min_by_key(|share| shares[*share]) else { break };
                    shares[share] += weight(&n);
                    if share == at {
                        own.push(n);
                    }
                }
                own.sort_unstable();
                own.into_iter().map(|n| narrow[n]).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stories;

    fn names(shard: &str) -> Vec<String> {
        let shard = Shard::parse(shard).unwrap();
        shard
            .of(stories::all())
            .iter()
            .map(|(area, story)| format!("{area}::{}", story.0))
            .collect()
    }

    #[test]
    fn shards_and_wide_contain_every_story_once() {
        for shards in
            [&["1/1", "wide"][..], &["1/2", "2/2", "wide"], &["3/3", "1/3", "wide", "2/3"]]
        {
            let mut found: Vec<_> = shards.iter().flat_map(|shard| names(shard)).collect();
            found.sort();
            let mut all: Vec<_> =
                stories::all().iter().map(|(area, story)| format!("{area}::{}", story.0)).collect();
            all.sort();
            assert_eq!(found, all, "{shards:?}");
        }
        assert_eq!(names("wide").len(), WIDE.len());
        let exists = |slow: &(&str, &str)| {
            stories::all().iter().any(|(area, story)| (*area, story.0) == *slow)
        };
        assert!(IGNORED.iter().all(exists), "{IGNORED:?}");
    }

    #[test]
    fn shards_are_about_equally_long_and_every_long_story_exists() {
        let full: Vec<_> =
            stories::all().iter().map(|(area, story)| format!("{area}::{}", story.0)).collect();
        for (beginning, _) in LONG {
            assert!(full.iter().any(|name| name.starts_with(beginning)), "{beginning}");
        }
        let share = |shard: &str| {
            let shard = Shard::parse(shard).unwrap().of(stories::all());
            shard.iter().map(|(area, story)| seconds(area, story.0)).sum::<u32>()
        };
        assert!(share("1/2").abs_diff(share("2/2")) <= USUAL);
    }

    #[test]
    fn invalid_shards_are_rejected() {
        for text in ["", "2", "0/2", "3/2", "1/0", "a/b", "Wide"] {
            assert_eq!(Shard::parse(text), None, "{text:?}");
        }
    }
}

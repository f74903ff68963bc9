//! Which of the stories one run tells, so that several labs can share them out.

use crate::stories::{SLOW, Story, WIDE};

/// Seconds that the long stories took on two CPUs, by a beginning of their full name that is theirs
/// alone. Shares are made about equally long with it; nothing else depends on it.
const LONG: &[(&str, u32)] = &[
    ("agent::", 150),
    ("damage::a pod", 90),
    ("damage::damaged images", 50),
    ("devices::a container has runc's", 90),
    ("empty_dir::", 60),
    ("guest_kernel::", 90),
    ("kills::a daemon killed at any phase of a pod's", 100),
    ("life_cycle::pods made and removed", 80),
    ("limits::a container over its memory", 60),
    ("limits::huge pages", 60),
    ("memory::", 60),
    ("programs::postgres", 120),
    ("programs::python", 60),
    ("reboot::", 50),
    ("shared_volumes::", 90),
    ("shim::a pod of containerd's CRI", 45),
    ("shim::ctr", 130),
    ("streaming::exec carries eight", 50),
    ("tool::nacelle run", 50),
    ("volumes::a ConfigMap", 60),
    ("volumes::a VOLUME", 60),
    ("volumes::a folder of the host", 60),
    ("volumes::a pod outlives", 60),
    ("workloads::", 100),
];
/// Seconds of every other story.
const USUAL: u32 = 20;

fn seconds(room: &str, name: &str) -> u32 {
    if SLOW.contains(&(room, name)) {
        return 0; // It is not run with the others.
    }
    let full = format!("{room}::{name}");
    LONG.iter().find(|(beginning, _)| full.starts_with(beginning)).map_or(USUAL, |each| each.1)
}

/// Some of the stories; the `Share`s of one number of them and `Wide` are all of them together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    All,
    /// The `at`th, from 0, of every `of` stories that one CPU is enough for.
    Share {
        at: usize,
        of: usize,
    },
    Wide,
}

impl Part {
    /// `wide`, or like `1/2`.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "wide" {
            return Some(Self::Wide);
        }
        let (at, of) = text.split_once('/')?;
        let (at, of) = (at.parse::<usize>().ok()?.checked_sub(1)?, of.parse().ok()?);
        (at < of).then_some(Self::Share { at, of })
    }

    /// Those of `all` that are in it, by room.
    pub fn of(self, all: Vec<(&'static str, Story)>) -> Vec<(&'static str, Story)> {
        let wide = |story: &(&str, Story)| WIDE.contains(&(story.0, story.1.0));
        match self {
            Self::All => all,
            Self::Wide => all.into_iter().filter(wide).collect(),
            Self::Share { at, of } => {
                // The longest first, each to the share that is shortest so far.
                let narrow: Vec<_> = all.into_iter().filter(|story| !wide(story)).collect();
                let weight = |n: &usize| {
                    let (room, (name, _)) = narrow[*n];
                    seconds(room, name)
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

    fn names(part: &str) -> Vec<String> {
        let part = Part::parse(part).unwrap();
        part.of(stories::all()).iter().map(|(room, story)| format!("{room}::{}", story.0)).collect()
    }

    #[test]
    fn the_shares_and_the_wide_ones_are_every_story_once() {
        for parts in [&["1/1", "wide"][..], &["1/2", "2/2", "wide"], &["3/3", "1/3", "wide", "2/3"]]
        {
            let mut told: Vec<_> = parts.iter().flat_map(|part| names(part)).collect();
            told.sort();
            let mut all: Vec<_> =
                stories::all().iter().map(|(room, story)| format!("{room}::{}", story.0)).collect();
            all.sort();
            assert_eq!(told, all, "{parts:?}");
        }
        assert_eq!(names("wide").len(), WIDE.len());
        let exists = |slow: &(&str, &str)| {
            stories::all().iter().any(|(room, story)| (*room, story.0) == *slow)
        };
        assert!(SLOW.iter().all(exists), "{SLOW:?}");
    }

    #[test]
    fn shares_are_about_equally_long_and_every_long_story_exists() {
        let full: Vec<_> =
            stories::all().iter().map(|(room, story)| format!("{room}::{}", story.0)).collect();
        for (beginning, _) in LONG {
            assert!(full.iter().any(|name| name.starts_with(beginning)), "{beginning}");
        }
        let share = |part: &str| {
            let part = Part::parse(part).unwrap().of(stories::all());
            part.iter().map(|(room, story)| seconds(room, story.0)).sum::<u32>()
        };
        assert!(share("1/2").abs_diff(share("2/2")) <= USUAL);
    }

    #[test]
    fn no_story_has_anothers_name_in_its_own() {
        // A run that goes on where another ended leaves out what passed by name (libtest's --skip).
        let all: Vec<_> =
            stories::all().iter().map(|(room, story)| format!("{room}::{}", story.0)).collect();
        for name in &all {
            assert_eq!(all.iter().filter(|other| other.contains(name)).count(), 1, "{name}");
        }
    }

    #[test]
    fn other_words_are_no_part() {
        for text in ["", "2", "0/2", "3/2", "1/0", "a/b", "Wide"] {
            assert_eq!(Part::parse(text), None, "{text:?}");
        }
    }
}

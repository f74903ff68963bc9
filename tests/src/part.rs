//! Which of the stories one run tells, so that several labs can share them out.

use crate::stories::{Story, WIDE};

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
                all.into_iter().filter(|story| !wide(story)).skip(at).step_by(of).collect()
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

//! Verifies that the messages in docs/troubleshooting.md exist in the source, so that a reworded error
//! does not leave a symptom that cannot be found.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const DOCUMENT: &str = "docs/troubleshooting.md";

pub(crate) fn check(repo: &Path, broken: &mut Vec<String>) -> Result<()> {
    let document = fs::read_to_string(repo.join(DOCUMENT)).context(DOCUMENT)?;
    let mut sources = String::new();
    read(&repo.join("crates"), &mut sources)?;
    let sources = without_line_continuations(&sources);
    for (line, message) in messages(&document) {
        if !sources.contains(&message) {
            broken.push(format!("{DOCUMENT}:{line}: no source has the message {message:?}"));
        }
    }
    Ok(())
}

/// The code spans in the first cells of all tables, with their line numbers.
fn messages(document: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (index, line) in document.lines().enumerate() {
        let Some(cell) = line.strip_prefix("| ").and_then(|rest| rest.split(" | ").next()) else {
            continue;
        };
        let mut rest = cell;
        while let Some(start) = rest.find('`') {
            // A span with backticks in it has two at each end.
            let fence = if rest[start..].starts_with("``") { "``" } else { "`" };
            let after = &rest[start + fence.len()..];
            let Some(end) = after.find(fence) else { break };
            found.push((index + 1, after[..end].to_owned()));
            rest = &after[end + fence.len()..];
        }
    }
    found
}

/// A string literal continues after a backslash at the end of a line, without the indentation.
fn without_line_continuations(text: &str) -> String {
    let mut parts = text.split("\\\n");
    let mut joined = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        joined.push_str(part.trim_start());
    }
    joined
}

fn read(dir: &Path, into: &mut String) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            // The tests of this rule hold no messages; build folders hold none of ours.
            if !path.ends_with("xtask") && !path.ends_with("target") {
                read(&path, into)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push_str(&fs::read_to_string(&path)?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_spans_of_first_cells_are_messages() {
        let document = "| `a b` and ``c `d` e`` | `not this` |\n\nprose `nor this`\n";
        let found = messages(document);
        assert_eq!(found, [(1, "a b".to_owned()), (1, "c `d` e".to_owned())]);
    }

    #[test]
    fn literals_over_several_lines_are_joined() {
        assert_eq!(without_line_continuations("\"a \\\n     b\""), "\"a b\"");
    }

    #[test]
    fn the_messages_of_the_repository_exist() {
        let mut broken = Vec::new();
        check(&crate::paths::repo(), &mut broken).unwrap();
        assert_eq!(broken, Vec::<String>::new());
    }
}

//! `nacelle completions` and `nacelle man`: files that are installed with the programs.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;

use super::arguments::Arguments;

pub(super) fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "nacelle", &mut script);
    Ok(std::io::stdout().write_all(&script)?)
}

/// One page per program and per verb, `nacelle-run.1` and the like.
pub(super) fn man_pages(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    for command in [Arguments::command(), crate::daemon::command()] {
        // The verb `help`, which clap adds, needs no page.
        clap_mangen::generate_to(command.disable_help_subcommand(true), dir)
            .with_context(|| format!("writing man pages to {}", dir.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_verb_has_a_man_page() {
        let dir = tempfile::tempdir().unwrap();
        let pages = dir.path().join("man1");
        man_pages(&pages).unwrap();
        let run = std::fs::read_to_string(pages.join("nacelle-run.1")).unwrap();
        assert!(run.contains("publish") && run.contains("entrypoint"), "{run}");
        for page in ["nacelle.1", "nacelle-exec.1", "nacelled.1", "nacelled-config.1"] {
            assert!(pages.join(page).is_file(), "{page}");
        }
        for hidden in ["nacelle-man.1", "nacelle-help.1", "nacelled-launcher.1"] {
            assert!(!pages.join(hidden).exists(), "{hidden}");
        }
    }

    #[test]
    fn scripts_of_all_shells_complete_the_verbs() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "nacelle", &mut script);
            let script = String::from_utf8(script).unwrap();
            for verb in ["run-pod", "inspect", "logs"] {
                assert!(script.contains(verb), "{shell}: {verb}");
            }
        }
    }
}

//! `nacelle-tests [FILTER]`: runs the stories; `nacelle-tests images DIR`: makes the images they
//! use. Takes libtest's options (`--list`, `--exact`, `--test-threads`, `--nocapture`).
//!
//! `NACELLE_PART=1/2` runs the first of two shards of the stories; those that need several CPUs are
//! in no shard and run with `NACELLE_PART=wide`.

use libtest_mimic::{Arguments, Failed, Trial};
use nacelle_tests::shard::Shard;
use nacelle_tests::{stories, watch};

fn main() -> std::process::ExitCode {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some("images") {
        let Some(folder) = words.next() else {
            eprintln!("usage: nacelle-tests images DIR");
            return std::process::ExitCode::from(2);
        };
        return match nacelle_tests::images::make_all(folder.as_ref()) {
            Ok(()) => std::process::ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("making the test images: {error:#}");
                std::process::ExitCode::FAILURE
            }
        };
    }
    let mut arguments = Arguments::from_args();
    // Stories compare the host's state before and after, so they run one at a time.
    arguments.test_threads.get_or_insert(1);
    let shard = match std::env::var("NACELLE_PART").ok().map(|text| Shard::parse(&text)) {
        None => Shard::All,
        Some(Some(shard)) => shard,
        Some(None) => {
            eprintln!("NACELLE_PART is neither 'wide' nor like 1/2");
            return std::process::ExitCode::from(2);
        }
    };
    let trials = shard
        .of(stories::all())
        .into_iter()
        .map(|(area, (name, story))| {
            let full = format!("{area}::{name}");
            let ignored = stories::IGNORED.contains(&(area, name));
            Trial::test(full.clone(), move || {
                // A VM in an emulated VM stalls sometimes. A story that passes only the second time is
                // printed with its first error, and counted by `.ci/run`.
                let Err(first) = watch::run(&full, story) else { return Ok(()) };
                match watch::run(&full, story) {
                    Ok(()) => {
                        eprintln!("\nFLAKY {full}: {first:?}");
                        Ok(())
                    }
                    Err(second) => Err(Failed::from(format!("{first:?}\nand then: {second:?}"))),
                }
            })
            .with_ignored_flag(ignored)
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

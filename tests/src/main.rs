//! `nacelle-tests [FILTER]`: runs the stories; `nacelle-tests images DIR`: makes the images they
//! use. Takes libtest's options (`--list`, `--exact`, `--test-threads`, `--nocapture`).
//!
//! `NACELLE_PART=1/2` leaves every second story out, and those that need several CPUs; these are
//! told with `NACELLE_PART=wide`.

use libtest_mimic::{Arguments, Failed, Trial};
use nacelle_tests::part::Part;
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
    // Stories compare the host before and after: one at a time.
    arguments.test_threads.get_or_insert(1);
    let part = match std::env::var("NACELLE_PART").ok().map(|text| Part::parse(&text)) {
        None => Part::All,
        Some(Some(part)) => part,
        Some(None) => {
            eprintln!("NACELLE_PART is neither 'wide' nor like 1/2");
            return std::process::ExitCode::from(2);
        }
    };
    let trials = part
        .of(stories::all())
        .into_iter()
        .map(|(room, (name, story))| {
            let full = format!("{room}::{name}");
            let slow = stories::SLOW.contains(&(room, name));
            Trial::test(full.clone(), move || {
                // A VM in an emulated VM stalls now and then. A story that fails, and passes the second
                // time, is printed with its first error, and counted by `.ci/run`.
                let Err(first) = watch::over(&full, story) else { return Ok(()) };
                match watch::over(&full, story) {
                    Ok(()) => {
                        eprintln!("\nFLAKY {full}: {first:?}");
                        Ok(())
                    }
                    Err(second) => Err(Failed::from(format!("{first:?}\nand then: {second:?}"))),
                }
            })
            .with_ignored_flag(slow)
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

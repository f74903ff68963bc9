//! Short runs of the fuzz targets in `crates/virtio/fuzz/`, a workspace of its own: they are built with the
//! coverage hooks of libFuzzer, which plain `rustc` can emit, so that no nightly compiler and no
//! further tool is needed. Corpora grow in the cache; a crash is copied into the repository's
//! `build/` and fails the run.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::{paths, run};

/// What `cargo fuzz` passes too, without the sanitizers, which need a nightly compiler.
const COVERAGE: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "-Cdebug-assertions",
    "-Coverflow-checks",
    "--cfg=fuzzing",
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long each target runs
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Only this target
    target: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<i32> {
    let dir = paths::repo().join("crates/virtio/fuzz");
    if !dir.join("Cargo.toml").exists() {
        eprintln!("SKIP: there are no fuzz targets");
        return Ok(0);
    }
    let built = paths::repo().join("build/fuzz");
    run::stage("building the fuzz targets", || {
        run::quiet(
            Command::new("cargo")
                .args([
                    "build",
                    "--quiet",
                    "--release",
                    "--bins",
                    "--target=x86_64-unknown-linux-gnu",
                ])
                .arg("--target-dir")
                .arg(&built)
                .env("RUSTFLAGS", COVERAGE.join(" "))
                .current_dir(&dir),
        )
    })?;
    let mut names: Vec<String> = fs::read_dir(dir.join("fuzz_targets"))
        .context("crates/virtio/fuzz/fuzz_targets holds the targets")?
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            (path.extension()? == "rs")
                .then(|| path.file_stem().map(|stem| stem.to_string_lossy().into_owned()))?
        })
        .filter(|name| args.target.as_ref().is_none_or(|only| only == name))
        .collect();
    names.sort();
    let mut failed = 0;
    for name in &names {
        let corpus = paths::cache()?.join("fuzz").join(name);
        let crashes = paths::repo().join("build/fuzz-crashes").join(name);
        fs::create_dir_all(&corpus)?;
        fs::create_dir_all(&crashes)?;
        let out = Command::new(built.join("x86_64-unknown-linux-gnu/release").join(name))
            .arg(&corpus)
            .arg(format!("-max_total_time={}", args.seconds))
            .arg(format!("-artifact_prefix={}/", crashes.display()))
            .args(["-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=1"])
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("starting the fuzz target {name}"))?;
        let log = String::from_utf8_lossy(&out.stderr).into_owned();
        let executions = log
            .lines()
            .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
            .unwrap_or("?");
        if out.status.success() {
            println!("fuzz {name}: ok, {} inputs", executions.trim());
        } else {
            failed += 1;
            let lines: Vec<_> = log.lines().collect();
            println!("fuzz {name}: FAILED\n{}", lines[lines.len().saturating_sub(25)..].join("\n"));
        }
    }
    println!("fuzz: {} targets, {failed} failed", names.len());
    Ok(i32::from(failed > 0))
}

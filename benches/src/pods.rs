//! Pods through a running nacelled: the phases of a cold start, and what an idle pod weighs.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{measure, table};

/// Starts `pods` idle pods one after the other, prints both tables, removes them.
pub fn run(bin: &Path, socket: &Path, pods: usize) -> Result<()> {
    let nacelle = Nacelle { program: bin.join("nacelle"), socket: socket.to_owned() };
    // The first pod pays for what is shared (page cache of kernel and agent) and does not count.
    let first = nacelle.pod()?;
    let before = measure::available_kib()?;
    let mut ids = Vec::new();
    let result = (|| -> Result<()> {
        for _ in 0..pods {
            ids.push(nacelle.pod()?);
        }
        std::thread::sleep(std::time::Duration::from_secs(2));
        let after = measure::available_kib()?;
        print_phases(&nacelle, &ids)?;
        let each = before.saturating_sub(after) as f64 / 1024.0 / pods as f64;
        table::print(
            &format!("Host memory a further idle pod (delta of MemAvailable / {pods})"),
            &["what", "MiB"],
            &[vec!["nacelle, no template".into(), format!("{each:.1}")]],
        );
        Ok(())
    })();
    ids.push(first);
    for id in &ids {
        nacelle.call(&["rm", "-f", id])?;
    }
    result
}

fn print_phases(nacelle: &Nacelle, ids: &[String]) -> Result<()> {
    let mut phases: Vec<(String, Vec<u64>)> = Vec::new();
    for id in ids {
        let trace: serde_json::Value =
            serde_json::from_str(&nacelle.call(&["trace", "--output", "json", id])?)?;
        for phase in trace.as_array().context("trace is not a list")? {
            let name = phase["name"].as_str().context("phase has no name")?;
            let time = phase["duration_us"].as_u64().context("phase has no duration_us")?;
            match phases.iter_mut().find(|(known, _)| known == name) {
                Some((_, times)) => times.push(time),
                None => phases.push((name.to_owned(), vec![time])),
            }
        }
    }
    let medians: Vec<(String, u64)> =
        phases.into_iter().map(|(name, mut times)| (name, table::median(&mut times))).collect();
    let whole: u64 = medians.iter().map(|(_, time)| time).sum();
    let rows: Vec<Vec<String>> = medians
        .iter()
        .map(|(name, time)| {
            let share = *time as f64 * 100.0 / whole.max(1) as f64;
            vec![name.clone(), format!("{:.1} ms", *time as f64 / 1000.0), format!("{share:.0} %")]
        })
        .collect();
    table::print(
        &format!("A pod's cold start by phase (median of {})", ids.len()),
        &["phase", "time", "share"],
        &rows,
    );
    Ok(())
}

struct Nacelle {
    program: std::path::PathBuf,
    socket: std::path::PathBuf,
}

impl Nacelle {
    fn call(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new(&self.program)
            .arg("--socket")
            .arg(&self.socket)
            .args(arguments)
            .output()
            .with_context(|| format!("running {}", self.program.display()))?;
        if !output.status.success() {
            bail!("nacelle {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// An idle pod without a container; its id.
    fn pod(&self) -> Result<String> {
        Ok(self.call(&["run-pod"])?.trim().to_owned())
    }
}

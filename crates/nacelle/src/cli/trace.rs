//! `nacelle trace`: the phases of a pod's start, with bars.

use anyhow::Result;

use super::arguments::Output;
use super::connect::{Client, call_error};
use super::{find, table};
use crate::api::{Phase, TraceRequest};

/// Columns of the chart.
const WIDTH: u64 = 40;

pub(super) async fn trace(client: &mut Client, pod: &str, output: Output) -> Result<()> {
    let pod = find::pod(client, pod).await?.id;
    let reply = client.debug.trace(TraceRequest { pod }).await.map_err(call_error)?;
    let phases = reply.into_inner().phases;
    if output == Output::Json {
        let list: Vec<serde_json::Value> = phases
            .iter()
            .map(|phase| {
                serde_json::json!({
                    "name": phase.name,
                    "start_us": phase.start_us,
                    "duration_us": phase.duration_us,
                })
            })
            .collect();
        return Ok(table::json(&list.into())?);
    }
    let end = phases.iter().map(|phase| phase.start_us + phase.duration_us).max().unwrap_or(0);
    let mut rows: Vec<Vec<String>> = phases
        .iter()
        .map(|phase| {
            vec![phase.name.clone(), ms(phase.start_us), ms(phase.duration_us), bar(phase, end)]
        })
        .collect();
    rows.push(vec!["total".into(), String::new(), ms(end), String::new()]);
    Ok(table::print(&["PHASE", "START", "DURATION", ""], &rows)?)
}

fn ms(micros: u64) -> String {
    format!("{:>8.1} ms", micros as f64 / 1000.0)
}

/// The phase's part of the chart.
fn bar(phase: &Phase, end: u64) -> String {
    let cell = |micros: u64| (micros * WIDTH).div_ceil(end.max(1)).min(WIDTH);
    let begin = (phase.start_us * WIDTH / end.max(1)).min(WIDTH - 1);
    let length = cell(phase.start_us + phase.duration_us).saturating_sub(begin).max(1);
    " ".repeat(begin as usize) + &"█".repeat(length as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_stay_inside_the_chart() {
        let phase = |start_us, duration_us| Phase { name: String::new(), start_us, duration_us };
        assert_eq!(bar(&phase(0, 100), 100).chars().count(), WIDTH as usize);
        assert_eq!(bar(&phase(50, 50), 100), " ".repeat(20) + &"█".repeat(20));
        assert_eq!(bar(&phase(100, 0), 100).chars().count(), WIDTH as usize);
        assert_eq!(bar(&phase(0, 0), 0), "█");
    }
}

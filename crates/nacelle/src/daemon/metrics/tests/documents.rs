//! docs/metrics.md and the dashboard name the metrics that there are; Prometheus' own tool accepts them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};

use super::full;

const TABLE: &str = include_str!("../../../../../../docs/metrics.md");
const DASHBOARD: &str = include_str!("../../../../../../docs/grafana-dashboard.json");

/// Name, type, labels.
type Metric = (String, String, BTreeSet<String>);

fn documented() -> Vec<Metric> {
    let rows = TABLE.lines().filter_map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let name = cells.get(1)?.strip_prefix('`')?.strip_suffix('`')?;
        let is_name = name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        if !is_name || !(name.starts_with("nacelle_") || name.starts_with("process_")) {
            return None;
        }
        let labels = cells[3].split(", ").map(|label| label.trim_matches('`'));
        let labels = labels.filter(|label| !label.is_empty()).map(str::to_owned);
        Some((name.to_owned(), cells[2].to_owned(), labels.collect()))
    });
    rows.collect()
}

#[tokio::test]
async fn the_table_in_the_documentation_lists_every_metric_with_its_labels() {
    let (endpoint, _) = full().await;
    let served = endpoint.scrape().await.into_iter().map(|family| {
        let labels = family.samples.iter().flat_map(|sample| sample.labels.keys().cloned());
        (family.name, family.kind, labels.filter(|label| label != "le").collect())
    });
    let served: BTreeSet<Metric> = served.collect();
    let documented = documented();
    let rows: BTreeSet<Metric> = documented.iter().cloned().collect();
    assert_eq!(rows.len(), documented.len(), "a metric is listed twice");
    let missing: Vec<_> = served.difference(&rows).collect();
    let unknown: Vec<_> = rows.difference(&served).collect();
    assert!(missing.is_empty() && unknown.is_empty(), "missing {missing:#?}, unknown {unknown:#?}");
}

/// Every string of a JSON value under the key.
fn under<'a>(value: &'a serde_json::Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        serde_json::Value::Object(members) => {
            for (name, member) in members {
                match member {
                    serde_json::Value::String(text) if name == key => found.push(text),
                    member => under(member, key, found),
                }
            }
        }
        serde_json::Value::Array(items) => items.iter().for_each(|item| under(item, key, found)),
        _ => {}
    }
}

#[test]
fn the_dashboard_uses_metrics_and_labels_that_exist() {
    let dashboard: serde_json::Value = serde_json::from_str(DASHBOARD).unwrap();
    let metrics: BTreeMap<String, (String, BTreeSet<String>)> =
        documented().into_iter().map(|(name, kind, labels)| (name, (kind, labels))).collect();
    let mut expressions = Vec::new();
    under(&dashboard, "expr", &mut expressions);
    under(&dashboard, "query", &mut expressions);
    assert!(expressions.len() >= 15, "{expressions:?}");
    // And the examples of alerts.
    let alerts = TABLE.lines().skip_while(|line| *line != "## Examples of alerts");
    let alerts: Vec<&str> = alerts.filter_map(|line| line.split('`').nth(1)).collect();
    assert!(alerts.len() >= 5, "{alerts:?}");
    expressions.extend(alerts);
    let mut used = 0;
    for expression in expressions {
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let mut labels = BTreeSet::new();
        for word in words.filter(|w| w.starts_with("nacelle_") || w.starts_with("process_")) {
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|s| word.strip_suffix(s));
            let histogram = base.and_then(|name| metrics.get(name));
            let known = match histogram {
                Some((kind, labels)) if kind == "histogram" => Some(labels),
                _ => metrics.get(word).filter(|(kind, _)| kind != "histogram").map(|(_, l)| l),
            };
            labels.extend(known.unwrap_or_else(|| panic!("{word} in {expression:?}")).clone());
            used += 1;
        }
        // by (...)
        for grouping in expression.split("by (").skip(1) {
            for label in grouping.split(')').next().unwrap_or_default().split(',').map(str::trim) {
                let known = labels.contains(label) || ["le", "instance"].contains(&label);
                assert!(known, "{label} in {expression:?}");
            }
        }
    }
    assert!(used >= 15, "{used}");
}

#[tokio::test]
async fn promtool_finds_nothing_wrong() {
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        eprintln!("SKIP: no promtool (Debian package prometheus)");
        return;
    };
    let (endpoint, _) = full().await;
    let reply = endpoint.ask("GET /metrics HTTP/1.0\r\n\r\n").await;
    let (_, body) = reply.split_once("\r\n\r\n").unwrap();
    promtool.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.trim().is_empty(), "{}: {said}", output.status);
}

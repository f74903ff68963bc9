//! A strict parser of the Prometheus text format 0.0.4, which refuses what `promtool check metrics`
//! refuses or warns of.

use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug)]
pub(super) struct Family {
    pub(super) name: String,
    pub(super) kind: String,
    pub(super) samples: Vec<Sample>,
}

#[derive(Debug)]
pub(super) struct Sample {
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) value: f64,
}

pub(super) fn parse(text: &str) -> Result<Vec<Family>, String> {
    if !text.ends_with('\n') {
        return Err("the last line has no end".into());
    }
    let mut families: Vec<Family> = Vec::new();
    let mut series = BTreeSet::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let wrong = |what: &str| format!("{what}: {line:?}");
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').ok_or_else(|| wrong("no help"))?;
            if !help.ends_with('.') || help.ends_with("..") {
                return Err(wrong("bad help"));
            }
            let kind = lines.next().and_then(|line| line.strip_prefix("# TYPE "));
            let kind = kind.and_then(|rest| rest.strip_prefix(name)?.strip_prefix(' '));
            let kind = kind.ok_or_else(|| wrong("no TYPE after this HELP"))?;
            if families.iter().any(|family| family.name == name) {
                return Err(wrong("described twice"));
            }
            check_name(name, kind).map_err(|what| wrong(&what))?;
            families.push(Family { name: name.into(), kind: kind.into(), samples: Vec::new() });
            continue;
        }
        let sample = sample(line).ok_or_else(|| wrong("no sample"))?;
        let family = families.last_mut().ok_or_else(|| wrong("not described"))?;
        let suffix = sample.name.strip_prefix(&family.name).ok_or_else(|| wrong("other family"))?;
        let allowed: &[&str] = match family.kind.as_str() {
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        if !allowed.contains(&suffix) {
            return Err(wrong("wrong suffix"));
        }
        if family.kind == "counter" && !(sample.value >= 0.0 && sample.value.is_finite()) {
            return Err(wrong("a counter has to be finite and not negative"));
        }
        if !series.insert((sample.name.clone(), sample.labels.clone())) {
            return Err(wrong("duplicate series"));
        }
        family.samples.push(sample);
    }
    for family in &families {
        if family.samples.is_empty() {
            return Err(format!("{} has no sample", family.name));
        }
        if family.kind == "histogram" {
            histogram(family)?;
        }
    }
    Ok(families)
}

fn check_name(name: &str, kind: &str) -> Result<(), String> {
    let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    if !plain || !(name.starts_with("nacelle_") || name.starts_with("process_")) {
        return Err("bad name".into());
    }
    if name.ends_with("_total") != (kind == "counter") {
        return Err("_total is for counters, and all of them".into());
    }
    match kind {
        "counter" | "gauge" => Ok(()),
        "histogram" if name.ends_with("_seconds") => Ok(()),
        _ => Err("bad type or unit".into()),
    }
}

/// `name{label="value",...} value`
fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, after) = rest.split_once("=\"")?;
            let plain = label.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            if label.is_empty() || !plain {
                return None;
            }
            let mut text = String::new();
            let mut chars = after.char_indices();
            let end = loop {
                match chars.next()? {
                    (at, '"') => break at,
                    (_, '\\') => text.push(match chars.next()?.1 {
                        'n' => '\n',
                        c @ ('\\' | '"') => c,
                        _ => return None,
                    }),
                    (_, c) => text.push(c),
                }
            };
            if labels.insert(label.to_owned(), text).is_some() {
                return None;
            }
            rest = &after[end + 1..];
            match rest.strip_prefix(',') {
                Some(more) => rest = more,
                None => break rest = rest.strip_prefix('}')?,
            }
        }
    }
    let value = rest.strip_prefix(' ')?;
    let value = if value == "+Inf" { f64::INFINITY } else { value.parse().ok()? };
    Some(Sample { name: name.into(), labels, value })
}

/// Bounds and counts of the buckets, the count, whether there is a sum.
type Parts = (Vec<(f64, f64)>, Option<f64>, bool);

/// Buckets in ascending order, cumulative, the last one +Inf and equal to the count.
fn histogram(family: &Family) -> Result<(), String> {
    let mut all: BTreeMap<BTreeMap<String, String>, Parts> = BTreeMap::new();
    for sample in &family.samples {
        let mut labels = sample.labels.clone();
        let bound = labels.remove("le");
        let one = all.entry(labels).or_default();
        match (&sample.name[family.name.len()..], bound) {
            ("_bucket", Some(bound)) => {
                let bound = if bound == "+Inf" { Ok(f64::INFINITY) } else { bound.parse() };
                let bound = bound.map_err(|_| format!("bad bound in {sample:?}"))?;
                one.0.push((bound, sample.value));
            }
            ("_count", None) => one.1 = Some(sample.value),
            ("_sum", None) => one.2 = true,
            _ => return Err(format!("bad sample of a histogram: {sample:?}")),
        }
    }
    for (labels, (buckets, count, sum)) in all {
        let ascending = buckets.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1);
        let last = buckets.last().copied();
        let complete = sum && count.is_some() && last == count.map(|count| (f64::INFINITY, count));
        if !ascending || !complete {
            return Err(format!("bad histogram {} {labels:?}", family.name));
        }
    }
    Ok(())
}

#[test]
fn the_parser_refuses_what_is_wrong() {
    let good =
        "# HELP nacelle_a_total A.\n# TYPE nacelle_a_total counter\nnacelle_a_total{x=\"1\"} 1\n";
    assert!(parse(good).is_ok());
    let gauge = "# HELP nacelle_g G.\n# TYPE nacelle_g gauge\n";
    let histogram = "# HELP nacelle_h_seconds H.\n# TYPE nacelle_h_seconds histogram\n";
    for (text, what) in [
        (good.trim_end().to_owned(), "no end"),
        (format!("{good}nacelle_a_total{{x=\"1\"}} 2\n"), "duplicate series"),
        (format!("{good}{good}"), "described twice"),
        (format!("{good}nacelle_b 1\n"), "other family"),
        (good.replace("counter", "gauge"), "_total"),
        (good.replace("_total", ""), "_total"),
        (good.replace("} 1", "} -1"), "not negative"),
        (good.replace("} 1", "} NaN"), "finite"),
        (good.replace("A.", "A"), "bad help"),
        (good.replace("\"1\"", "1"), "no sample"),
        (good.replace("\"1\"", "\"\\z\""), "no sample"),
        (good.replace("x=\"1\"", "x=\"1\",x=\"2\""), "no sample"),
        (good.replace("# TYPE nacelle_a_total counter\n", ""), "no TYPE"),
        (gauge.to_owned(), "has no sample"),
        ("nacelle_a 1\n".to_owned(), "not described"),
        (
            format!(
                "{histogram}nacelle_h_seconds_bucket{{le=\"+Inf\"}} 2\nnacelle_h_seconds_sum 1.0\n\
                 nacelle_h_seconds_count 1\n"
            ),
            "bad histogram",
        ),
        (
            format!("{histogram}nacelle_h_seconds_sum 1.0\nnacelle_h_seconds_count 1\n"),
            "bad histogram",
        ),
    ] {
        let error = parse(&text).map(|_| ()).expect_err(&text);
        assert!(error.contains(what), "{text}: {error}");
    }
}

//! Whether this host's KVM is worth anything: `nacelle-vmm probe` runs guest code and times it,
//! because the presence of /dev/kvm says nothing.

use std::process::{Command, Stdio};

use anyhow::Result;

use crate::paths;

/// What the probe found.
pub(crate) struct Verdict {
    pub(crate) usable: bool,
    /// A sentence that continues "KVM here ...".
    pub(crate) why: String,
}

/// Runs the probe of the binary that was built.
pub(crate) fn probe() -> Verdict {
    let unusable = |why: String| Verdict { usable: false, why };
    let Some(vmm) = paths::newest_binary("nacelle-vmm") else {
        return unusable("was not measured: nacelle-vmm is not built yet".into());
    };
    let out = match Command::new(vmm).arg("probe").stdin(Stdio::null()).output() {
        Ok(out) => out,
        Err(error) => return unusable(format!("was not measured: {error}")),
    };
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
    let mips = report["mips"].as_f64().unwrap_or_default();
    let usable = report["usable"].as_bool().unwrap_or(false);
    let why = report["why"].as_str().unwrap_or("the probe printed nothing").to_owned();
    match (usable, mips > 0.0) {
        (true, _) => {
            Verdict { usable, why: format!("runs {mips:.0} million instructions a second") }
        }
        (false, true) => unusable(format!("runs only {mips:.1} million instructions a second")),
        (false, false) => unusable(format!("is not usable ({why})")),
    }
}

/// Prints "host" or "lab".
pub(crate) fn run() -> Result<i32> {
    println!("{}", if probe().usable { "host" } else { "lab" });
    Ok(0)
}

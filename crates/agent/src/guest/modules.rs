//! Kernel modules, for a stock distribution kernel: `/modules.list` in the initramfs names the
//! uncompressed `.ko` files below `/lib/modules`, one a line, in the order to load them. Our own
//! kernel has no modules and its initramfs no list.

use std::ffi::CStr;
use std::fs::{self, File};
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use crate::error::{Doing, Result};

const LIST: &str = "/modules.list";
const FOLDER: &str = "/lib/modules";

/// Loads what the list names. A module that fails is reported and does not stop the others: the
/// list may name more than this kernel needs.
pub(super) fn load_all() -> Vec<crate::error::Error> {
    let Ok(list) = fs::read_to_string(LIST) else { return Vec::new() };
    list.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .filter_map(|name| load(name).err())
        .collect()
}

fn load(name: &str) -> Result<()> {
    let what = || format!("load kernel module {name}");
    let path = Path::new(FOLDER).join(name.trim_start_matches('/'));
    let path = if path.exists() { path } else { Path::new("/").join(name) };
    let file = File::open(path).doing(what)?;
    const NO_PARAMETERS: &CStr = c"";
    match finit_module(&file, NO_PARAMETERS, ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error).doing(what),
    }
}

/// Frees the memory of the files.
pub(super) fn forget() {
    let _ = fs::remove_dir_all(FOLDER);
    let _ = fs::remove_file(LIST);
}

//! Kernel modules of a stock distribution kernel: `/modules.list` in the initramfs lists
//! uncompressed `.ko` files below `/lib/modules`, one on each line, in load order. nacelle's own
//! kernel has no modules and its initramfs no list.

use std::ffi::CStr;
use std::fs::{self, File};
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use crate::error::{Context, Result};

const LIST: &str = "/modules.list";
const DIRECTORY: &str = "/lib/modules";

/// Loads the listed modules. Continues after failures, as the list may contain modules that the
/// kernel does not need.
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
    let path = Path::new(DIRECTORY).join(name.trim_start_matches('/'));
    let path = if path.exists() { path } else { Path::new("/").join(name) };
    let file = File::open(path).context(what)?;
    const NO_PARAMETERS: &CStr = c"";
    match finit_module(&file, NO_PARAMETERS, ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error).context(what),
    }
}

/// Deletes the files to free the memory of the initramfs.
pub(super) fn delete_files() {
    let _ = fs::remove_dir_all(DIRECTORY);
    let _ = fs::remove_file(LIST);
}

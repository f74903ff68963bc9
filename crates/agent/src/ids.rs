//! Validation of ids chosen by the host, which become parts of paths.

use crate::error::{Error, Result};

/// Maximum length of an id, bytes; it names a cgroup and a directory.
const MAX_ID: usize = 128;

/// Refuses an id that is not a plain file name.
pub fn check(field: &'static str, id: &str) -> Result<()> {
    let plain = id.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
    if id.is_empty() || id.len() > MAX_ID || !plain || id.starts_with(['.', '-']) {
        return Err(Error::invalid(
            field,
            format!("{id:?} is not 1 to {MAX_ID} letters, digits, `_`, `-` and `.`"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_cannot_be_paths() {
        assert!(check("id", "0a1b-x_y.z").is_ok());
        for bad in ["", ".", "..", "a/b", "../a", "-a", "a b", "a,b", "a:b", &"x".repeat(129)] {
            assert!(check("id", bad).is_err(), "{bad:?}");
        }
    }
}

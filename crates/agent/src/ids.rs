//! Names that the host chooses: they become parts of paths, so they are held to a plain alphabet.

use crate::error::{Error, Result};

/// Longest id, bytes: it is a cgroup's and a folder's name.
const MAX_ID: usize = 128;

/// Refuses what could not be a file name of its own.
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

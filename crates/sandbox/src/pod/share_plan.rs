//! Chooses the share that serves a volume, from the host's mounts and the pod's existing shares.
//!
//! The guest sees all shares in one file system, in which a directory has only one location. So a
//! volume below a shared directory is served as a path in that share: otherwise the guest would
//! find the directory at two locations and move it at each lookup. That holds for the same
//! directory, a subdirectory, and bind mounts of either (a kubelet's subPaths). If the outer share
//! does not show exactly the same (other submounts, another propagation, another file by that
//! name), the volume gets its own share: the files are still the same, but the directory has two
//! locations.
//!
//! Outer volumes of a container are planned first. An existing share of an inner directory stays
//! until its last user is removed.

use std::path::PathBuf;

use vmm_api::shares::{FOLLOWS, STRICT};

use crate::error::Error;
use crate::host::mounts::Location;
use crate::model::{Access, Propagation, ShareUse};
use crate::vmm::serial;

/// A volume that needs a share.
#[derive(Debug, Clone)]
pub(super) struct ShareRequest {
    /// Index of the volume in its container.
    pub(super) volume: usize,
    pub(super) path: PathBuf,
    pub(super) access: Access,
    pub(super) propagation: Propagation,
    pub(super) ids: String,
    pub(super) strict: bool,
}

impl ShareRequest {
    /// Its own share, with this name.
    pub(super) fn named(self, name: String) -> ShareUse {
        let Self { volume, path, access, propagation, ids, strict } = self;
        ShareUse {
            volume,
            name,
            source: path,
            sub_path: String::new(),
            access,
            propagation,
            ids,
            strict,
        }
    }
}

/// A share of the pod, and the current location of its source.
struct ExistingShare {
    share: ShareUse,
    location: Location,
    /// The source still leads to what is shared.
    current: bool,
}

/// Chooses a share for each volume. Blocks.
pub(super) fn plan(known: &[ShareUse], wanted: Vec<ShareRequest>) -> Result<Vec<ShareUse>, Error> {
    let mut shares: Vec<ExistingShare> = Vec::new();
    for share in known {
        if shares.iter().any(|other| other.share.name == share.name) {
            continue;
        }
        // A source that no longer exists cannot match.
        let Ok(location) = Location::of(&share.source) else { continue };
        let current = name(&location, share.propagation, &share.ids, share.strict) == share.name;
        shares.push(ExistingShare { share: share.clone(), location, current });
    }
    let mut found = Vec::new();
    for wanted in wanted {
        let location = Location::of(&wanted.path)
            .map_err(|e| Error::precondition(format!("volume {}: {e}", wanted.path.display())))?;
        found.push((wanted, location));
    }
    found.sort_by_key(|(_, location)| location.root.components().count());
    let mut planned = Vec::new();
    for (wanted, location) in found {
        check_ids(&shares, &wanted, &location)?;
        planned.push(share(&mut shares, wanted, location));
    }
    Ok(planned)
}

/// A file has only one owner in the guest.
fn check_ids(
    shares: &[ExistingShare],
    wanted: &ShareRequest,
    location: &Location,
) -> Result<(), Error> {
    let other = shares
        .iter()
        .find(|known| known.share.ids != wanted.ids && known.location.overlaps(location));
    match other {
        None => Ok(()),
        Some(known) => Err(Error::Unsupported {
            message: format!(
                "{} is shared with containers of this pod whose user namespace maps ids \
                 differently (through {}); containers that share files need the same user \
                 namespace",
                wanted.path.display(),
                known.share.source.display()
            ),
        }),
    }
}

fn share(shares: &mut Vec<ExistingShare>, wanted: ShareRequest, location: Location) -> ShareUse {
    let is_compatible = |known: &&ExistingShare| {
        known.current
            && known.share.propagation == wanted.propagation
            && known.share.ids == wanted.ids
            && known.share.strict == wanted.strict
    };
    let candidates = shares.iter().filter(is_compatible).filter_map(|known| {
        let path = known.location.path_to(&location)?.into_os_string().into_string().ok()?;
        Some((path.matches('/').count() + usize::from(!path.is_empty()), path, &known.share))
    });
    // The outermost one: the guest looks there.
    if let Some((_, sub_path, known)) = candidates.max_by_key(|(depth, ..)| *depth) {
        let (name, source) = (known.name.clone(), known.source.clone());
        return ShareUse { name, source, sub_path, ..wanted.named(String::new()) };
    }
    let name = name(&location, wanted.propagation, &wanted.ids, wanted.strict);
    let share = ShareRequest { path: location.path.clone(), ..wanted }.named(name);
    shares.push(ExistingShare { share: share.clone(), location, current: true });
    share
}

/// Name derived from location, file identity and submounts.
fn name(location: &Location, propagation: Propagation, ids: &str, strict: bool) -> String {
    let text = format!("{location:?} {propagation:?} {ids}");
    let follows = if propagation == Propagation::HostToContainer { FOLLOWS } else { "" };
    let strict = if strict { STRICT } else { "" };
    serial('f', text.as_bytes()) + follows + strict
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn wanted(volume: usize, path: &Path) -> ShareRequest {
        ShareRequest {
            volume,
            path: path.to_owned(),
            access: Access::ReadWrite,
            propagation: Propagation::Private,
            ids: String::new(),
            strict: false,
        }
    }

    #[test]
    fn a_directory_below_a_shared_one_is_a_path_in_that_share_in_any_order() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("file"), "").unwrap();
        let file = inner.join("file");
        let volumes =
            vec![wanted(0, &file), wanted(1, &inner), wanted(2, dir.path()), wanted(3, &inner)];
        let planned = plan(&[], volumes).unwrap();
        let at = |n: usize| planned.iter().find(|share| share.volume == n).unwrap();
        let name = &at(2).name;
        assert!(planned.iter().all(|share| share.name == *name && share.source == dir.path()));
        assert_eq!(at(0).sub_path, "a/b/file");
        assert_eq!((at(1).sub_path.as_str(), at(2).sub_path.as_str()), ("a/b", ""));

        // An existing inner share stays but is not used once there is an outer one.
        let first = plan(&[], vec![wanted(0, &inner)]).unwrap();
        let second = plan(&first, vec![wanted(0, dir.path())]).unwrap();
        assert_ne!(first[0].name, second[0].name);
        let both = [first[0].clone(), second[0].clone()];
        let third = plan(&both, vec![wanted(0, &inner)]).unwrap();
        assert_eq!((&third[0].name, third[0].sub_path.as_str()), (&second[0].name, "a/b"));
    }

    #[test]
    fn a_source_that_differs_gets_its_own_share() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let outer = plan(&[], vec![wanted(0, dir.path())]).unwrap();
        let own = |wanted| {
            let planned = plan(&outer, vec![wanted]).unwrap();
            planned[0].name != outer[0].name && planned[0].sub_path.is_empty()
        };
        assert!(!own(wanted(0, &inner)));
        assert!(own(ShareRequest {
            propagation: Propagation::HostToContainer,
            ..wanted(0, &inner)
        }));
        let strict = ShareRequest { strict: true, ..wanted(0, &inner) };
        assert!(own(strict.clone()));
        assert!(plan(&outer, vec![strict]).unwrap()[0].name.ends_with(STRICT));
        let elsewhere = tempfile::tempdir().unwrap();
        assert!(own(wanted(0, elsewhere.path())));
        // Another directory with the name of the first.
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        for path in [&old, &new] {
            fs::create_dir(path).unwrap();
        }
        let outer = plan(&[], vec![wanted(0, &new)]).unwrap();
        fs::remove_dir(&new).unwrap();
        fs::rename(&old, &new).unwrap();
        let again = plan(&outer, vec![wanted(0, &new)]).unwrap();
        assert_ne!(again[0].name, outer[0].name);
    }

    #[test]
    fn a_file_with_two_id_mappings_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let plain = plan(&[], vec![wanted(0, &inner)]).unwrap();
        let mapped =
            |path: &Path| ShareRequest { ids: "uid 0 100000 65536;".into(), ..wanted(0, path) };
        for path in [dir.path(), &inner] {
            let refused = plan(&plain, vec![mapped(path)]).unwrap_err();
            assert!(matches!(refused, Error::Unsupported { .. }), "{refused}");
        }
        let elsewhere = tempfile::tempdir().unwrap();
        assert!(plan(&plain, vec![mapped(elsewhere.path())]).is_ok());
    }
}

//! Which share a volume is served by: decided from what is on the host, and from the shares that the
//! pod has.
//!
//! The guest sees all shares in one file system, in which a folder is at one place only. So a volume
//! that lies in a folder which is shared already is served as a path in that share: otherwise the
//! guest would find the folder at two places, and move it from one to the other each time it looks.
//! That holds for the same folder, a folder in it, and bind mounts of either (a kubelet's subPaths).
//! Where the outer share does not show exactly the same (other mounts below, another propagation,
//! something else by that name), the volume has a share of its own: files are then still the same
//! files, but the folder has two places.
//!
//! Shares come from the outside in, so of two volumes of a container the outer one is looked at
//! first. A share of an inner folder that was there before goes on until its last user has gone.

use std::path::PathBuf;

use vmm_api::shares::{FOLLOWS, STRICT};

use crate::error::Error;
use crate::host::mounts::Place;
use crate::model::{Access, Propagation, ShareUse};
use crate::vmm::serial;

/// A volume that is to be shared.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    /// Number of the volume in its container.
    pub(super) volume: usize,
    pub(super) path: PathBuf,
    pub(super) access: Access,
    pub(super) propagation: Propagation,
    pub(super) ids: String,
    pub(super) strict: bool,
}

impl Wanted {
    /// As a share of its own with this name.
    pub(super) fn under(self, name: String) -> ShareUse {
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

/// A share of the pod, and where its source is now.
struct Known {
    share: ShareUse,
    place: Place,
    /// What is shared is what would be shared now.
    current: bool,
}

/// Finds a share for each volume. Blocks.
pub(super) fn plan(known: &[ShareUse], wanted: Vec<Wanted>) -> Result<Vec<ShareUse>, Error> {
    let mut shares: Vec<Known> = Vec::new();
    for share in known {
        if shares.iter().any(|other| other.share.name == share.name) {
            continue;
        }
        // What has gone from the host leads to nothing that could be wanted now.
        let Ok(place) = Place::of(&share.source) else { continue };
        let current = name(&place, share.propagation, &share.ids, share.strict) == share.name;
        shares.push(Known { share: share.clone(), place, current });
    }
    let mut found = Vec::new();
    for wanted in wanted {
        let place = Place::of(&wanted.path)
            .map_err(|e| Error::precondition(format!("volume {}: {e}", wanted.path.display())))?;
        found.push((wanted, place));
    }
    found.sort_by_key(|(_, place)| place.root.components().count());
    let mut planned = Vec::new();
    for (wanted, place) in found {
        check_ids(&shares, &wanted, &place)?;
        planned.push(share(&mut shares, wanted, place));
    }
    Ok(planned)
}

/// One file has one owner in the guest.
fn check_ids(shares: &[Known], wanted: &Wanted, place: &Place) -> Result<(), Error> {
    let other =
        shares.iter().find(|known| known.share.ids != wanted.ids && known.place.overlaps(place));
    match other {
        None => Ok(()),
        Some(known) => Err(Error::Unsupported {
            message: format!(
                "{} is shared with containers of this pod whose user namespace maps ids \
                 differently, by way of {}; containers that share files need the same user \
                 namespace",
                wanted.path.display(),
                known.share.source.display()
            ),
        }),
    }
}

fn share(shares: &mut Vec<Known>, wanted: Wanted, place: Place) -> ShareUse {
    let alike = |known: &&Known| {
        known.current
            && known.share.propagation == wanted.propagation
            && known.share.ids == wanted.ids
            && known.share.strict == wanted.strict
    };
    let ways = shares.iter().filter(alike).filter_map(|known| {
        let path = known.place.path_to(&place)?.into_os_string().into_string().ok()?;
        Some((path.matches('/').count() + usize::from(!path.is_empty()), path, &known.share))
    });
    // The outermost, where the guest looks for it.
    if let Some((_, sub_path, known)) = ways.max_by_key(|(depth, ..)| *depth) {
        let (name, source) = (known.name.clone(), known.source.clone());
        return ShareUse { name, source, sub_path, ..wanted.under(String::new()) };
    }
    let name = name(&place, wanted.propagation, &wanted.ids, wanted.strict);
    let share = Wanted { path: place.path.clone(), ..wanted }.under(name);
    shares.push(Known { share: share.clone(), place, current: true });
    share
}

/// The same for what is the same: by where it is, which file that is, and what is mounted below.
fn name(place: &Place, propagation: Propagation, ids: &str, strict: bool) -> String {
    let text = format!("{place:?} {propagation:?} {ids}");
    let follows = if propagation == Propagation::HostToContainer { FOLLOWS } else { "" };
    let strict = if strict { STRICT } else { "" };
    serial('f', text.as_bytes()) + follows + strict
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn wanted(volume: usize, path: &Path) -> Wanted {
        Wanted {
            volume,
            path: path.to_owned(),
            access: Access::ReadWrite,
            propagation: Propagation::Private,
            ids: String::new(),
            strict: false,
        }
    }

    #[test]
    fn a_folder_in_a_shared_one_is_a_path_in_that_share_whichever_comes_first() {
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

        // An inner one that is there already stays, but is used no more once there is an outer one.
        let first = plan(&[], vec![wanted(0, &inner)]).unwrap();
        let second = plan(&first, vec![wanted(0, dir.path())]).unwrap();
        assert_ne!(first[0].name, second[0].name);
        let both = [first[0].clone(), second[0].clone()];
        let third = plan(&both, vec![wanted(0, &inner)]).unwrap();
        assert_eq!((&third[0].name, third[0].sub_path.as_str()), (&second[0].name, "a/b"));
    }

    #[test]
    fn what_is_not_exactly_the_same_has_a_share_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let outer = plan(&[], vec![wanted(0, dir.path())]).unwrap();
        let own = |wanted| {
            let planned = plan(&outer, vec![wanted]).unwrap();
            planned[0].name != outer[0].name && planned[0].sub_path.is_empty()
        };
        assert!(!own(wanted(0, &inner)));
        assert!(own(Wanted { propagation: Propagation::HostToContainer, ..wanted(0, &inner) }));
        let strict = Wanted { strict: true, ..wanted(0, &inner) };
        assert!(own(strict.clone()));
        assert!(plan(&outer, vec![strict]).unwrap()[0].name.ends_with(STRICT));
        let elsewhere = tempfile::tempdir().unwrap();
        assert!(own(wanted(0, elsewhere.path())));
        // Another folder by the name of the first.
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
    fn files_that_would_have_two_owners_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let plain = plan(&[], vec![wanted(0, &inner)]).unwrap();
        let mapped = |path: &Path| Wanted { ids: "uid 0 100000 65536;".into(), ..wanted(0, path) };
        for path in [dir.path(), &inner] {
            let refused = plan(&plain, vec![mapped(path)]).unwrap_err();
            assert!(matches!(refused, Error::Unsupported { .. }), "{refused}");
        }
        let elsewhere = tempfile::tempdir().unwrap();
        assert!(plan(&plain, vec![mapped(elsewhere.path())]).is_ok());
    }
}

//! Volumes of which the guest is to cache nothing, by an annotation of the pod.

use std::collections::BTreeMap;

use sandbox::model::{Volume, VolumeSource};

use crate::convert::Refusal;

/// `*`, or the places of volumes in containers, with commas between them.
const ANNOTATION: &str = "nacelle.dev/strict-volumes";

/// The places of those among `volumes`, which are a container's; others of the pod may have the rest.
pub fn strict(
    annotations: &BTreeMap<String, String>,
    volumes: &[Volume],
) -> Result<Vec<String>, Refusal> {
    let Some(requested) = annotations.get(ANNOTATION) else { return Ok(Vec::new()) };
    let requested: Vec<&str> = requested.split(',').map(str::trim).collect();
    if let Some(invalid) = requested.iter().find(|place| **place != "*" && !place.starts_with('/'))
    {
        let why = format!("{ANNOTATION}: {invalid:?} is neither \"*\" nor the place of a volume");
        return Err(Refusal::invalid("annotations", why));
    }
    let shared = volumes.iter().filter(|v| matches!(v.source, VolumeSource::Shared { .. }));
    let places = shared.map(|volume| &volume.container_path);
    let named = places.filter(|place| requested.iter().any(|w| *w == "*" || *w == place.as_str()));
    Ok(named.cloned().collect())
}

#[cfg(test)]
mod tests {
    use sandbox::model::{Access, Propagation};

    use super::*;

    #[test]
    fn some_volumes_or_all_that_are_shared() {
        let volume = |place: &str, source| Volume {
            container_path: place.into(),
            source,
            access: Access::ReadWrite,
            propagation: Propagation::Private,
        };
        let host_path = || std::path::PathBuf::from("/x");
        let volumes = [
            volume("/a", VolumeSource::Shared { host_path: host_path() }),
            volume("/b", VolumeSource::Shared { host_path: host_path() }),
            volume("/c", VolumeSource::Copied { host_path: host_path() }),
        ];
        let of = |text: &str| strict(&[(ANNOTATION.to_owned(), text.to_owned())].into(), &volumes);
        assert_eq!(strict(&BTreeMap::new(), &volumes), Ok(vec![]));
        assert_eq!(of("*"), Ok(vec!["/a".into(), "/b".into()]));
        assert_eq!(of("/b, /c, /nowhere"), Ok(vec!["/b".into()]));
        for bad in ["", "true", "/a,,/b", "a"] {
            assert!(of(bad).is_err(), "{bad:?}");
        }
    }
}

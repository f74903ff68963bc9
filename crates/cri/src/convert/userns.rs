//! User namespaces of pods (`hostUsers: false`): the mapping that a kubelet has chosen, and the
//! OCI words for it (runtime-spec, config-linux.md#user-namespace-mappings).
//!
//! "Host ids" are ids of the pod's guest: a process that breaks out of its container is nobody
//! there, and then still inside the VM.

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};

use super::{Refusal, known};
use crate::v1;

/// One range of ids; it always begins with the container's 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub host: u32,
    pub length: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserNamespace {
    pub uids: Range,
    pub gids: Range,
}

/// None: the container has its guest's ids.
pub fn user_namespace(
    options: Option<&v1::NamespaceOption>,
) -> Result<Option<UserNamespace>, Refusal> {
    let Some(requested) = options.and_then(|options| options.userns_options.as_ref()) else {
        return Ok(None);
    };
    const FIELD: &str = "namespace_options.userns_options";
    let mode: v1::NamespaceMode = known(&format!("{FIELD}.mode"), requested.mode)?;
    match mode {
        v1::NamespaceMode::Node if requested.uids.is_empty() && requested.gids.is_empty() => {
            Ok(None)
        }
        v1::NamespaceMode::Node => Err(Refusal::invalid(
            format!("{FIELD}.mode"),
            "NODE has no mappings, and some are given",
        )),
        v1::NamespaceMode::Pod => Ok(Some(UserNamespace {
            uids: range(&format!("{FIELD}.uids"), &requested.uids)?,
            gids: range(&format!("{FIELD}.gids"), &requested.gids)?,
        })),
        other => Err(Refusal::invalid(
            format!("{FIELD}.mode"),
            format!("{} is not a mode it can have; use POD or NODE", other.as_str_name()),
        )),
    }
}

fn range(field: &str, mappings: &[v1::IdMapping]) -> Result<Range, Refusal> {
    let [mapping] = mappings else {
        return Err(Refusal::invalid(
            field,
            format!("{} mappings; exactly one is served", mappings.len()),
        ));
    };
    if mapping.container_id != 0 {
        return Err(Refusal::invalid(
            field,
            format!("begins at {}: a container needs an id 0", mapping.container_id),
        ));
    }
    // 2^32-1 is no id: it says "leave as it is" to chown(2).
    if mapping.length == 0 || mapping.host_id.checked_add(mapping.length).is_none() {
        return Err(Refusal::invalid(
            field,
            format!("{} ids from {} on are no range", mapping.length, mapping.host_id),
        ));
    }
    Ok(Range { host: mapping.host_id, length: mapping.length })
}

impl Range {
    pub fn to_oci(self) -> Result<Vec<LinuxIdMapping>, Refusal> {
        LinuxIdMappingBuilder::default()
            .container_id(0u32)
            .host_id(self.host)
            .size(self.length)
            .build()
            .map(|mapping| vec![mapping])
            .map_err(|error| Refusal::invalid("userns_options", error.to_string()))
    }

    /// Whether a mount's mapping is the pod's own.
    pub fn is(self, mappings: &[v1::IdMapping]) -> bool {
        matches!(mappings, [one] if one.container_id == 0
            && one.host_id == self.host
            && one.length == self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(container_id: u32, host_id: u32, length: u32) -> v1::IdMapping {
        v1::IdMapping { container_id, host_id, length }
    }

    fn request(mode: v1::NamespaceMode, ids: &[v1::IdMapping]) -> v1::NamespaceOption {
        v1::NamespaceOption {
            userns_options: Some(v1::UserNamespace {
                mode: mode as i32,
                uids: ids.to_vec(),
                gids: ids.to_vec(),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_pods_mapping_is_taken_and_a_hosts_user_has_none() {
        let pod = request(v1::NamespaceMode::Pod, &[mapping(0, 1000, 100_000)]);
        let range = Range { host: 1000, length: 100_000 };
        let expected = UserNamespace { uids: range, gids: range };
        assert_eq!(user_namespace(Some(&pod)), Ok(Some(expected)));
        assert_eq!(user_namespace(Some(&request(v1::NamespaceMode::Node, &[]))), Ok(None));
        assert_eq!(user_namespace(Some(&v1::NamespaceOption::default())), Ok(None));
        assert_eq!(user_namespace(None), Ok(None));
        let oci = range.to_oci().unwrap();
        assert_eq!((oci[0].container_id(), oci[0].host_id(), oci[0].size()), (0, 1000, 100_000));
        assert!(range.is(&[mapping(0, 1000, 100_000)]) && !range.is(&[mapping(0, 1, 100_000)]));
    }

    #[test]
    fn mappings_that_no_container_can_have_are_refused() {
        let one = mapping(0, 1000, 100_000);
        for (mode, ids) in [
            (v1::NamespaceMode::Pod, vec![]),
            (v1::NamespaceMode::Pod, vec![one, one]),
            (v1::NamespaceMode::Pod, vec![mapping(1, 1000, 10)]),
            (v1::NamespaceMode::Pod, vec![mapping(0, 1000, 0)]),
            (v1::NamespaceMode::Pod, vec![mapping(0, u32::MAX, 1)]),
            (v1::NamespaceMode::Node, vec![one]),
            (v1::NamespaceMode::Container, vec![one]),
            (v1::NamespaceMode::Target, vec![]),
        ] {
            let refusal = user_namespace(Some(&request(mode, &ids))).unwrap_err().to_string();
            assert!(refusal.starts_with("namespace_options.userns_options"), "{refusal}");
        }
    }
}

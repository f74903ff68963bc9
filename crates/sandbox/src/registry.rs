//! Ids, names and uids in use. Checks and reserves in one step, under a lock that is held for map
//! accesses only.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::model::{ContainerId, Meta, PodId};
use crate::pod::Handle;

/// (namespace, name, uid, attempt) of a pod.
type PodName = (String, String, String, u32);

#[derive(Default)]
pub(crate) struct Registry {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    pods: BTreeMap<PodId, Entry>,
    pod_names: HashMap<PodName, PodId>,
    containers: BTreeMap<ContainerId, PodId>,
    container_names: HashMap<(PodId, String, u32), ContainerId>,
    /// Containers whose creation can still be cancelled.
    creating: BTreeSet<ContainerId>,
}

struct Entry {
    name: PodName,
    /// One; for a pod with an unreadable record, all that it may have.
    uids: Vec<u32>,
    /// None until the owner task exists.
    handle: Option<Arc<Handle>>,
}

fn pod_name(meta: &Meta) -> PodName {
    (meta.namespace.clone(), meta.name.clone(), meta.uid.clone(), meta.attempt)
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves the id, the name and a uid of `uids`; returns the uid.
    pub(crate) fn reserve_pod(
        &self,
        id: &PodId,
        meta: &Meta,
        max: usize,
        uids: std::ops::Range<u32>,
    ) -> Result<u32, Error> {
        let mut inner = self.lock();
        let name = pod_name(meta);
        if let Some(holder) = inner.pod_names.get(&name) {
            return Err(Error::Exists {
                what: "pod name",
                name: format!("{}/{} ({}, attempt {})", name.0, name.1, name.2, name.3),
                holder: holder.clone(),
            });
        }
        if inner.pods.len() >= max {
            let message = format!("this node holds {max} pods, its configured limit (max_pods)");
            return Err(Error::ResourceExhausted { message });
        }
        let taken: BTreeSet<u32> = inner.pods.values().flat_map(|e| e.uids.clone()).collect();
        let Some(uid) = uids.clone().find(|uid| !taken.contains(uid)) else {
            let message = format!("all {} uids for VMMs are taken (uid_range)", uids.len());
            return Err(Error::ResourceExhausted { message });
        };
        inner.insert(id, name, vec![uid]);
        Ok(uid)
    }

    /// Registers a pod of the journal, with its recorded name and uids.
    pub(crate) fn insert_pod(&self, id: &PodId, meta: &Meta, uids: &[u32]) {
        self.lock().insert(id, pod_name(meta), uids.to_vec());
    }

    pub(crate) fn set_handle(&self, id: &PodId, handle: Arc<Handle>) {
        if let Some(entry) = self.lock().pods.get_mut(id) {
            entry.handle = Some(handle);
        }
    }

    /// Releases everything that the pod holds.
    pub(crate) fn release_pod(&self, id: &PodId) {
        let mut inner = self.lock();
        if let Some(entry) = inner.pods.remove(id)
            && inner.pod_names.get(&entry.name) == Some(id)
        {
            inner.pod_names.remove(&entry.name);
        }
        inner.containers.retain(|_, pod| pod != id);
        inner.container_names.retain(|(pod, ..), _| pod != id);
        let Inner { containers, creating, .. } = &mut *inner;
        creating.retain(|container| containers.contains_key(container));
    }

    pub(crate) fn reserve_container(
        &self,
        pod: &PodId,
        id: &ContainerId,
        meta: &Meta,
        max: usize,
    ) -> Result<(), Error> {
        let mut inner = self.lock();
        let name = (pod.clone(), meta.name.clone(), meta.attempt);
        if let Some(holder) = inner.container_names.get(&name) {
            return Err(Error::Exists {
                what: "container name",
                name: format!("{} (attempt {})", meta.name, meta.attempt),
                holder: holder.clone(),
            });
        }
        if inner.containers.values().filter(|p| *p == pod).count() >= max {
            let message = format!("the pod holds {max} containers, the limit (max_containers)");
            return Err(Error::ResourceExhausted { message });
        }
        inner.container_names.insert(name, id.clone());
        inner.containers.insert(id.clone(), pod.clone());
        Ok(())
    }

    pub(crate) fn release_container(&self, id: &ContainerId) {
        let mut inner = self.lock();
        inner.containers.remove(id);
        inner.creating.remove(id);
        inner.container_names.retain(|_, holder| holder != id);
    }

    pub(crate) fn mark_creating(&self, id: &ContainerId) {
        self.lock().creating.insert(id.clone());
    }

    /// Releases the name of a container whose creation is cancelled, unless it is complete. Its id
    /// stays until the creation is undone.
    pub(crate) fn cancel_container(&self, id: &ContainerId) {
        let mut inner = self.lock();
        if inner.creating.remove(id) {
            inner.container_names.retain(|_, holder| holder != id);
        }
    }

    /// Marks the creation as complete; false if it was cancelled and its name released.
    pub(crate) fn complete_container(&self, id: &ContainerId) -> bool {
        self.lock().creating.remove(id)
    }

    pub(crate) fn handles(&self) -> Vec<Arc<Handle>> {
        self.lock().pods.values().filter_map(|e| e.handle.clone()).collect()
    }

    pub(crate) fn pod_ids(&self) -> Vec<PodId> {
        self.lock().pods.keys().cloned().collect()
    }

    /// The pod with this id or unambiguous id prefix.
    pub(crate) fn find_pod(&self, id: &str) -> Result<Arc<Handle>, Error> {
        let inner = self.lock();
        let key = unambiguous(&inner.pods, "pod", id)?;
        let handle = inner.pods.get(key).and_then(|e| e.handle.clone());
        handle.ok_or_else(|| Error::NotFound { what: "pod", id: id.to_owned() })
    }

    /// The container's full id, and its pod.
    pub(crate) fn find_container(&self, id: &str) -> Result<(ContainerId, Arc<Handle>), Error> {
        let inner = self.lock();
        let key = unambiguous(&inner.containers, "container", id)?;
        let pod = inner.containers.get(key).and_then(|pod| inner.pods.get(pod));
        pod.and_then(|e| e.handle.clone())
            .map(|handle| (key.clone(), handle))
            .ok_or_else(|| Error::NotFound { what: "container", id: id.to_owned() })
    }
}

impl Inner {
    fn insert(&mut self, id: &PodId, name: PodName, uids: Vec<u32>) {
        // A pod with an unknown name reserves none.
        if !name.1.is_empty() {
            self.pod_names.insert(name.clone(), id.clone());
        }
        self.pods.insert(id.clone(), Entry { name, uids, handle: None });
    }
}

fn unambiguous<'a, V>(
    map: &'a BTreeMap<String, V>,
    what: &'static str,
    id: &str,
) -> Result<&'a String, Error> {
    let mut matching = map.range(id.to_owned()..).take_while(|(k, _)| k.starts_with(id));
    match matching.next() {
        Some((key, _)) if !id.is_empty() => {
            let more = matching.count();
            if more > 0 && key != id {
                return Err(Error::Ambiguous { what, id: id.to_owned(), count: more + 1 });
            }
            Ok(key)
        }
        _ => Err(Error::NotFound { what, id: id.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(name: &str, attempt: u32) -> Meta {
        Meta { name: name.into(), attempt, ..Meta::default() }
    }

    fn reserve(registry: &Registry, id: &str, name: &str) -> Result<u32, Error> {
        registry.reserve_pod(&id.into(), &meta(name, 0), 3, 100..110)
    }

    #[test]
    fn of_many_pods_with_one_name_exactly_one_gets_it() {
        let registry = Registry::default();
        let won = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..16)
                .map(|n| {
                    let registry = &registry;
                    scope.spawn(move || reserve(registry, &format!("pod{n}"), "web").is_ok())
                })
                .collect();
            tries.into_iter().filter(|_| true).map(|t| t.join().unwrap()).filter(|ok| *ok).count()
        });
        assert_eq!(won, 1);
    }

    #[test]
    fn a_name_and_a_uid_are_free_again_once_the_pod_is_gone() {
        let registry = Registry::default();
        assert_eq!(reserve(&registry, "a", "web").unwrap(), 100);
        assert_eq!(reserve(&registry, "b", "db").unwrap(), 101);
        assert!(matches!(reserve(&registry, "c", "web"), Err(Error::Exists { .. })));
        registry.release_pod(&"a".into());
        assert_eq!(reserve(&registry, "c", "web").unwrap(), 100);
    }

    #[test]
    fn pods_without_a_known_name_hold_their_uids_and_no_name() {
        let registry = Registry::default();
        registry.insert_pod(&"x".into(), &Meta::default(), &[100, 101]);
        registry.insert_pod(&"y".into(), &Meta::default(), &[]);
        assert_eq!(reserve(&registry, "a", "web").unwrap(), 102);
        registry.release_pod(&"x".into());
        registry.release_pod(&"y".into());
        assert_eq!(reserve(&registry, "b", "db").unwrap(), 100);
    }

    #[test]
    fn a_cancelled_creation_releases_its_name_and_a_completed_one_keeps_it() {
        let registry = Registry::default();
        reserve(&registry, "pod", "web").unwrap();
        let (pod, first, second) = ("pod".to_owned(), "c1".to_owned(), "c2".to_owned());
        let take = |id: &ContainerId| registry.reserve_container(&pod, id, &meta("app", 0), 9);
        take(&first).unwrap();
        registry.mark_creating(&first);
        registry.cancel_container(&first);
        assert!(!registry.complete_container(&first));
        take(&second).unwrap();
        registry.mark_creating(&second);
        // The first is undone now and does not release the second's name.
        registry.release_container(&first);
        assert!(registry.complete_container(&second));
        // The caller goes away after completion.
        registry.cancel_container(&second);
        assert!(matches!(take(&first), Err(Error::Exists { .. })));
    }

    #[test]
    fn the_limit_of_pods_holds() {
        let registry = Registry::default();
        for n in ["a", "b", "c"] {
            reserve(&registry, n, n).unwrap();
        }
        assert!(matches!(reserve(&registry, "d", "d"), Err(Error::ResourceExhausted { .. })));
    }

    #[test]
    fn a_container_name_can_be_reused_only_with_another_attempt() {
        let registry = Registry::default();
        let pod = "p".to_owned();
        registry.reserve_container(&pod, &"1".into(), &meta("app", 0), 9).unwrap();
        let again = registry.reserve_container(&pod, &"2".into(), &meta("app", 0), 9);
        assert!(matches!(again, Err(Error::Exists { holder, .. }) if holder == "1"));
        registry.reserve_container(&pod, &"2".into(), &meta("app", 1), 9).unwrap();
        registry.release_container(&"1".into());
        registry.reserve_container(&pod, &"3".into(), &meta("app", 0), 9).unwrap();
    }

    #[test]
    fn an_id_prefix_is_accepted_only_if_it_is_unambiguous() {
        let map: BTreeMap<String, ()> =
            ["abc", "abd", "x", "xy"].map(|k| (k.to_owned(), ())).into();
        assert_eq!(unambiguous(&map, "pod", "abc").unwrap(), "abc");
        assert_eq!(unambiguous(&map, "pod", "x").unwrap(), "x");
        assert!(matches!(unambiguous(&map, "pod", "ab"), Err(Error::Ambiguous { count: 2, .. })));
        assert!(matches!(unambiguous(&map, "pod", ""), Err(Error::NotFound { .. })));
        assert!(matches!(unambiguous(&map, "pod", "q"), Err(Error::NotFound { .. })));
    }
}

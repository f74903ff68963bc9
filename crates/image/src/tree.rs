//! The file tree that the layers of an image add up to (OCI image-spec v1.1, layer.md), in memory
//! and without any path of the host: a name from an image can only ever lead to a node of this
//! tree.
//!
//! Rules, with `L` the layer being applied:
//! - a directory over a directory keeps the children and takes the new metadata; anything else
//!   replaces what was there;
//! - a whiteout hides only what layers below `L` brought, whatever the order of entries in `L`;
//! - a hard link is a second name of one inode;
//! - symlinks in the parents of a path are followed inside of the tree (`..` at its root stays
//!   there), the last component never is;
//! - missing parents appear as root's, mode 0755.

use std::collections::BTreeMap;

use crate::path::display;

/// Follows at most this many symlinks in one path, as the kernel does.
const MAX_SYMLINKS: u32 = 40;
/// Components walked for one path, those of its symlinks included: forty targets of two thousand
/// components each would make every entry cost milliseconds.
const MAX_STEPS: u32 = 4096;
/// A chain of symlinked parents can build a tree deeper than any one path is long; walks recurse.
const MAX_DEPTH: usize = 512;
/// Files that the whiteouts of one layer look at, for each that an image may have: else a mark that
/// is repeated in a full directory costs the square of the layer's length.
const MAX_VISITS: u64 = 4;
/// What a node costs beside its name, target and attributes.
const NODE_COST: u64 = 192;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TreeError {
    #[error("the parent {parent:?} of {path:?} is not a directory")]
    NotADirectory { path: String, parent: String },
    #[error("too many symlinks in the parents of {path:?}")]
    SymlinkLoop { path: String },
    #[error("{path:?} lies more than {MAX_DEPTH} directories deep")]
    TooDeep { path: String },
    #[error("hard link {path:?} points to {target:?}, which does not exist")]
    LinkTargetMissing { path: String, target: String },
    #[error("hard link {path:?} points to the directory {target:?}")]
    LinkToDirectory { path: String, target: String },
    #[error("the root directory can neither be replaced by another kind of file nor removed")]
    Root,
    #[error("the image has more than {limit} files")]
    TooManyNodes { limit: u64 },
    #[error("names, symlinks and attributes of the image exceed {limit} bytes")]
    TooMuchMetadata { limit: u64 },
    #[error("the whiteouts of the layer look at more than {limit} files")]
    TooManyVisits { limit: u64 },
}

pub type NodeId = u32;
pub const ROOT: NodeId = 0;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub mtime_nsec: u32,
    /// Sorted by name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind<F> {
    Directory(BTreeMap<Box<[u8]>, Child>),
    File(F),
    Symlink(Box<[u8]>),
    Char { rdev: u32 },
    Block { rdev: u32 },
    Fifo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Child {
    pub node: NodeId,
    /// The layer that brought the name, or last gave the directory its metadata.
    layer: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node<F> {
    pub metadata: Metadata,
    pub kind: Kind<F>,
    /// Names that lead here.
    pub links: u32,
}

/// `F` is what is known of a file's content.
#[derive(Debug)]
pub struct Tree<F> {
    nodes: Vec<Node<F>>,
    layer: u32,
    max_nodes: u64,
    metadata_left: u64,
    max_metadata: u64,
    /// Of the present layer; see [`MAX_VISITS`].
    visits_left: u64,
}

impl<F> Tree<F> {
    /// The limits hold for everything ever added, hidden or not: a hostile image could otherwise
    /// grow the table by replacing the same name for ever.
    pub fn new(max_nodes: u64, max_metadata: u64) -> Self {
        let metadata = Metadata { mode: 0o755, ..Metadata::default() };
        let root = Node { metadata, kind: Kind::Directory(BTreeMap::new()), links: 1 };
        Self {
            nodes: vec![root],
            layer: 0,
            max_nodes,
            metadata_left: max_metadata,
            max_metadata,
            visits_left: Self::max_visits(max_nodes),
        }
    }

    fn max_visits(max_nodes: u64) -> u64 {
        max_nodes.saturating_mul(MAX_VISITS)
    }

    /// What is added from here on belongs to the next layer.
    pub fn begin_layer(&mut self) {
        self.layer += 1;
        self.visits_left = Self::max_visits(self.max_nodes);
    }

    pub fn node(&self, id: NodeId) -> &Node<F> {
        &self.nodes[id as usize]
    }

    /// Nodes without a name.
    pub fn hidden(&self) -> impl Iterator<Item = &Node<F>> {
        self.nodes.iter().filter(|node| node.links == 0)
    }

    /// Puts a directory at `path` (split and checked by [`split`]).
    pub fn add_directory(&mut self, path: &[&[u8]], metadata: Metadata) -> Result<(), TreeError> {
        let Some((name, parents)) = path.split_last() else {
            self.nodes[ROOT as usize].metadata = metadata;
            return Ok(());
        };
        let (parent, _) = self.resolve(path, parents, true)?;
        let layer = self.layer;
        if let Some(child) = self.children_mut(parent).get_mut(*name) {
            let node = child.node;
            child.layer = layer;
            if matches!(self.nodes[node as usize].kind, Kind::Directory(_)) {
                self.charge_metadata(&metadata)?;
                self.nodes[node as usize].metadata = metadata;
                return Ok(());
            }
        }
        self.put(parent, name, metadata, Kind::Directory(BTreeMap::new()))
    }

    /// Puts anything but a directory at `path`.
    pub fn add(
        &mut self,
        path: &[&[u8]],
        metadata: Metadata,
        kind: Kind<F>,
    ) -> Result<(), TreeError> {
        let (name, parents) = path.split_last().ok_or(TreeError::Root)?;
        let (parent, _) = self.resolve(path, parents, true)?;
        self.put(parent, name, metadata, kind)
    }

    pub fn add_hard_link(&mut self, path: &[&[u8]], target: &[&[u8]]) -> Result<(), TreeError> {
        let missing =
            || TreeError::LinkTargetMissing { path: display(path), target: display(target) };
        let to_directory =
            || TreeError::LinkToDirectory { path: display(path), target: display(target) };
        let (name, parents) = path.split_last().ok_or(TreeError::Root)?;
        let (target_name, target_parents) = target.split_last().ok_or_else(to_directory)?;
        let (target_parent, _) =
            self.resolve(target, target_parents, false).map_err(|e| match e {
                TreeError::NotADirectory { .. } => missing(),
                other => other,
            })?;
        let node = self.children(target_parent).get(*target_name).ok_or_else(missing)?.node;
        if matches!(self.nodes[node as usize].kind, Kind::Directory(_)) {
            return Err(to_directory());
        }
        let (parent, _) = self.resolve(path, parents, true)?;
        self.charge(name.len() as u64)?;
        self.nodes[node as usize].links += 1;
        self.replace(parent, name, node);
        Ok(())
    }

    /// Takes away whatever `path` names, of any layer.
    pub fn remove(&mut self, path: &[&[u8]]) -> Result<(), TreeError> {
        let (name, parents) = path.split_last().ok_or(TreeError::Root)?;
        let (parent, _) = self.resolve(path, parents, true)?;
        if let Some(child) = self.children_mut(parent).remove(*name) {
            self.release(child.node);
        }
        Ok(())
    }

    /// Hides what lower layers put at `path`.
    pub fn whiteout(&mut self, path: &[&[u8]]) -> Result<(), TreeError> {
        let (name, parents) = path.split_last().ok_or(TreeError::Root)?;
        let Some(parent) = self.existing_directory(path, parents)? else { return Ok(()) };
        self.prune(parent, name)
    }

    /// Hides what lower layers put into the directory `path`.
    pub fn opaque(&mut self, path: &[&[u8]]) -> Result<(), TreeError> {
        let Some(directory) = self.existing_directory(path, path)? else { return Ok(()) };
        let names: Vec<Box<[u8]>> = self.children(directory).keys().cloned().collect();
        for name in names {
            self.prune(directory, &name)?;
        }
        Ok(())
    }

    fn existing_directory(
        &mut self,
        path: &[&[u8]],
        directory: &[&[u8]],
    ) -> Result<Option<NodeId>, TreeError> {
        match self.resolve(path, directory, false) {
            Ok((id, _)) => Ok(Some(id)),
            Err(TreeError::NotADirectory { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Removes `name` as far as it comes from lower layers; a directory stays when something of
    /// this layer lies in it.
    fn prune(&mut self, parent: NodeId, name: &[u8]) -> Result<(), TreeError> {
        let Some(child) = self.children(parent).get(name).copied() else { return Ok(()) };
        self.visits_left = self
            .visits_left
            .checked_sub(1)
            .ok_or(TreeError::TooManyVisits { limit: Self::max_visits(self.max_nodes) })?;
        let mut keep = child.layer == self.layer;
        if let Kind::Directory(children) = &self.nodes[child.node as usize].kind {
            let names: Vec<Box<[u8]>> = children.keys().cloned().collect();
            for inner in names {
                self.prune(child.node, &inner)?;
            }
            keep |= !self.children(child.node).is_empty();
        }
        if !keep {
            self.children_mut(parent).remove(name);
            self.release(child.node);
        }
        Ok(())
    }

    /// Finds the directory at `directory`; with `create`, makes what is missing. `path` is for
    /// messages. The second value is its depth.
    fn resolve(
        &mut self,
        path: &[&[u8]],
        directory: &[&[u8]],
        create: bool,
    ) -> Result<(NodeId, usize), TreeError> {
        let mut stack = vec![ROOT];
        // Components still to walk, the next one last.
        let mut ahead: Vec<Vec<u8>> = directory.iter().rev().map(|c| c.to_vec()).collect();
        let (mut symlinks, mut steps) = (0, 0);
        while let Some(component) = ahead.pop() {
            steps += 1;
            if steps > MAX_STEPS {
                return Err(TreeError::SymlinkLoop { path: display(path) });
            }
            if component == b".." {
                if stack.len() > 1 {
                    stack.pop();
                }
                continue;
            }
            let at = stack[stack.len() - 1];
            let not_a_directory = || TreeError::NotADirectory {
                path: display(path),
                parent: String::from_utf8_lossy(&component).into_owned(),
            };
            let next = match self.children(at).get(&component[..]) {
                Some(child) => child.node,
                None if create => {
                    if stack.len() >= MAX_DEPTH {
                        return Err(TreeError::TooDeep { path: display(path) });
                    }
                    let metadata = Metadata { mode: 0o755, ..Metadata::default() };
                    self.put(at, &component, metadata, Kind::Directory(BTreeMap::new()))?;
                    (self.nodes.len() - 1) as NodeId
                }
                None => return Err(not_a_directory()),
            };
            match &self.nodes[next as usize].kind {
                Kind::Directory(_) => stack.push(next),
                Kind::Symlink(target) => {
                    symlinks += 1;
                    if symlinks > MAX_SYMLINKS {
                        return Err(TreeError::SymlinkLoop { path: display(path) });
                    }
                    if target.first() == Some(&b'/') {
                        stack.truncate(1);
                    }
                    // `..` is harmless here: it cannot leave the tree.
                    let parts = target.split(|&b| b == b'/');
                    let parts = parts.filter(|part| !part.is_empty() && *part != b".");
                    ahead.extend(parts.map(<[u8]>::to_vec).collect::<Vec<_>>().into_iter().rev());
                }
                _ => return Err(not_a_directory()),
            }
        }
        if stack.len() >= MAX_DEPTH {
            return Err(TreeError::TooDeep { path: display(path) });
        }
        Ok((stack[stack.len() - 1], stack.len()))
    }

    fn put(
        &mut self,
        parent: NodeId,
        name: &[u8],
        metadata: Metadata,
        kind: Kind<F>,
    ) -> Result<(), TreeError> {
        let target = if let Kind::Symlink(target) = &kind { target.len() } else { 0 };
        self.charge(NODE_COST + (name.len() + target) as u64)?;
        self.charge_metadata(&metadata)?;
        if self.nodes.len() as u64 >= self.max_nodes {
            return Err(TreeError::TooManyNodes { limit: self.max_nodes });
        }
        let id = self.nodes.len() as NodeId;
        self.nodes.push(Node { metadata, kind, links: 1 });
        self.replace(parent, name, id);
        Ok(())
    }

    fn replace(&mut self, parent: NodeId, name: &[u8], node: NodeId) {
        let child = Child { node, layer: self.layer };
        if let Some(old) = self.children_mut(parent).insert(name.into(), child) {
            self.release(old.node);
        }
    }

    /// One name less for `node`; a directory lets go of its children.
    fn release(&mut self, node: NodeId) {
        let mut released = vec![node];
        while let Some(id) = released.pop() {
            let node = &mut self.nodes[id as usize];
            node.links -= 1;
            if node.links > 0 {
                continue;
            }
            match &mut node.kind {
                Kind::Directory(children) => {
                    released.extend(std::mem::take(children).values().map(|child| child.node));
                }
                Kind::Symlink(target) => *target = Box::default(),
                _ => {}
            }
            node.metadata.xattrs = BTreeMap::new();
        }
    }

    fn charge_metadata(&mut self, metadata: &Metadata) -> Result<(), TreeError> {
        self.charge(metadata.xattrs.iter().map(|(k, v)| (k.len() + v.len() + 64) as u64).sum())
    }

    fn charge(&mut self, bytes: u64) -> Result<(), TreeError> {
        self.metadata_left = self
            .metadata_left
            .checked_sub(bytes)
            .ok_or(TreeError::TooMuchMetadata { limit: self.max_metadata })?;
        Ok(())
    }

    fn children(&self, id: NodeId) -> &BTreeMap<Box<[u8]>, Child> {
        match &self.nodes[id as usize].kind {
            Kind::Directory(children) => children,
            _ => unreachable!("only directories are asked for children"),
        }
    }

    fn children_mut(&mut self, id: NodeId) -> &mut BTreeMap<Box<[u8]>, Child> {
        match &mut self.nodes[id as usize].kind {
            Kind::Directory(children) => children,
            _ => unreachable!("only directories are asked for children"),
        }
    }

    /// The node at `path`, no symlink followed.
    #[cfg(test)]
    pub fn lookup(&self, path: &str) -> Option<&Node<F>> {
        let mut at = ROOT;
        for component in crate::path::split(path.as_bytes()).ok()? {
            let Kind::Directory(children) = &self.nodes[at as usize].kind else { return None };
            at = children.get(component)?.node;
        }
        Some(self.node(at))
    }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;

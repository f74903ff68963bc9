//! The file tree that results from an image's layers (OCI image-spec v1.1, layer.md), in memory and
//! without host paths: a name from an image can only resolve to a node of this tree.
//!
//! Rules, where `L` is the layer being applied:
//! - a directory over a directory keeps the children and takes the new metadata; anything else
//!   replaces the existing node;
//! - a whiteout hides only entries of layers below `L`, regardless of the order of entries in `L`;
//! - a hard link is a second name of one inode;
//! - symlinks in the parents of a path are followed inside the tree (`..` at the root stays there),
//!   the last component is not followed;
//! - missing parents are created with owner root and mode 0755.

use std::collections::BTreeMap;

use crate::path::display;

/// Maximum symlinks followed in one path, as in the kernel.
const MAX_SYMLINKS: u32 = 40;
/// Maximum components resolved for one path, including those of its symlinks: forty targets of two
/// thousand components each would make every entry cost milliseconds.
const MAX_STEPS: u32 = 4096;
/// Maximum depth: symlinked parents can build a tree deeper than PATH_MAX allows, and walks
/// recurse.
const MAX_DEPTH: usize = 512;
/// Files that the whiteouts of one layer may visit, as a multiple of the image's maximum number of
/// files: repeated opaque whiteouts of a full directory would cost quadratic time.
const MAX_VISITS: u64 = 4;
/// Bytes charged per node besides its name, target and attributes.
const NODE_COST: u64 = 192;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TreeError {
    #[error("the parent {parent:?} of {path:?} is not a directory")]
    NotADirectory { path: String, parent: String },
    #[error("too many symlinks in the parents of {path:?}")]
    SymlinkLoop { path: String },
    #[error("{path:?} is more than {MAX_DEPTH} directories deep")]
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
    #[error("the whiteouts of the layer visit more than {limit} files")]
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
    /// The layer that added the name, or last set the directory's metadata.
    layer: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node<F> {
    pub metadata: Metadata,
    pub kind: Kind<F>,
    /// Number of names of this node.
    pub links: u32,
}

/// `F` is the location of a file's content.
#[derive(Debug)]
pub struct Tree<F> {
    nodes: Vec<Node<F>>,
    layer: u32,
    max_nodes: u64,
    metadata_left: u64,
    max_metadata: u64,
    /// Remaining visits of the current layer; see [`MAX_VISITS`].
    visits_left: u64,
}

impl<F> Tree<F> {
    /// The limits cover everything ever added, hidden or not: a hostile image could otherwise grow
    /// the table without end by replacing one name.
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

    /// Starts the next layer; later additions belong to it.
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

    /// Adds a directory at `path` (split and checked by [`split`]).
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

    /// Adds a node other than a directory at `path`.
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

    /// Removes `path` in all layers.
    pub fn remove(&mut self, path: &[&[u8]]) -> Result<(), TreeError> {
        let (name, parents) = path.split_last().ok_or(TreeError::Root)?;
        let (parent, _) = self.resolve(path, parents, true)?;
        if let Some(child) = self.children_mut(parent).remove(*name) {
            self.release(child.node);
        }
        Ok(())
    }

    /// Hides the entries of lower layers at `path`.
    pub fn whiteout(&mut self, path: &[&[u8]]) -> Result<(), TreeError> {
        let (name, parents) = path.split_last().ok_or(TreeError::Root)?;
        let Some(parent) = self.existing_directory(path, parents)? else { return Ok(()) };
        self.prune(parent, name)
    }

    /// Hides the entries of lower layers in the directory `path`.
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

    /// Removes `name` if it comes from lower layers; a directory stays if it contains entries of
    /// this layer.
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

    /// Finds the directory `directory`; with `create`, creates missing parents. `path` is used in
    /// messages. The second value is the depth.
    fn resolve(
        &mut self,
        path: &[&[u8]],
        directory: &[&[u8]],
        create: bool,
    ) -> Result<(NodeId, usize), TreeError> {
        let mut stack = vec![ROOT];
        // Remaining components in reverse order.
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
                    // `..` cannot leave the tree.
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

    /// Removes one name of `node`; a directory without names releases its children.
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
            _ => unreachable!("only directories have children"),
        }
    }

    fn children_mut(&mut self, id: NodeId) -> &mut BTreeMap<Box<[u8]>, Child> {
        match &mut self.nodes[id as usize].kind {
            Kind::Directory(children) => children,
            _ => unreachable!("only directories have children"),
        }
    }

    /// The node at `path` without following symlinks.
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

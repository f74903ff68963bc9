//! Property test of the tree against a model: a map from paths to their content.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// One entry of a layer; paths use few names so that they collide often.
#[derive(Debug, Clone)]
enum Op {
    Directory(Vec<u8>),
    File(Vec<u8>, u8),
    Whiteout(Vec<u8>),
    Opaque(Vec<u8>),
    NextLayer,
}

/// Path -> (layer that added it, content; `None` for directories).
type Model = BTreeMap<Vec<u8>, (u32, Option<u8>)>;

fn below<'a>(model: &'a Model, path: &'a [u8]) -> impl Iterator<Item = Vec<u8>> + 'a {
    model.keys().filter(move |p| p.len() > path.len() && p.starts_with(path)).cloned()
}

fn hide(model: &mut Model, path: &[u8], layer: u32) {
    let hidden: Vec<_> = below(model, path).filter(|p| model[p].0 < layer).collect();
    // Deepest first: a directory stays if it contains entries of this layer.
    for path in hidden.into_iter().rev().chain([path.to_vec()]) {
        let has_children = below(model, &path).next().is_some();
        if model.get(&path).is_some_and(|(l, _)| *l < layer) && !has_children {
            model.remove(&path);
        }
    }
}

/// Applies an operation to the model; false if a parent is a file.
fn model_apply(model: &mut Model, op: &Op, layer: u32) -> bool {
    match op {
        Op::Directory(path) | Op::File(path, _) => {
            for end in 1..path.len() {
                match model.get(&path[..end]) {
                    Some((_, Some(_))) => return false,
                    Some((_, None)) => {}
                    None => drop(model.insert(path[..end].to_vec(), (layer, None))),
                }
            }
            let content = if let Op::File(_, content) = op { Some(*content) } else { None };
            let was_directory = matches!(model.get(path), Some((_, None)));
            if !(was_directory && content.is_none()) {
                for inner in below(model, path).collect::<Vec<_>>() {
                    model.remove(&inner);
                }
            }
            model.insert(path.clone(), (layer, content));
        }
        Op::Whiteout(path) => hide(model, path, layer),
        Op::Opaque(path) => {
            let children: Vec<_> =
                below(model, path).filter(|p| p.len() == path.len() + 1).collect();
            for child in children {
                hide(model, &child, layer);
            }
        }
        Op::NextLayer => {}
    }
    true
}

fn flatten(tree: &Tree<u8>) -> BTreeMap<Vec<u8>, Option<u8>> {
    let mut out = BTreeMap::new();
    let mut todo = vec![(Vec::new(), ROOT)];
    while let Some((path, id)) = todo.pop() {
        let node = tree.node(id);
        assert!(node.links > 0, "a node with a name has links");
        match &node.kind {
            Kind::Directory(children) => {
                todo.extend(
                    children
                        .iter()
                        .map(|(name, child)| ([&path[..], &name[..]].concat(), child.node)),
                );
                out.insert(path, None);
            }
            Kind::File(content) => drop(out.insert(path, Some(*content))),
            _ => unreachable!("only directories and files are made here"),
        }
    }
    out.remove(&b""[..]);
    out
}

fn path() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(vec![b'a', b'b', b'c']), 1..5)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => path().prop_map(Op::Directory),
        5 => (path(), any::<u8>()).prop_map(|(path, content)| Op::File(path, content)),
        2 => path().prop_map(Op::Whiteout),
        1 => path().prop_map(Op::Opaque),
        2 => Just(Op::NextLayer),
    ]
}

proptest! {
    #[test]
    fn the_tree_equals_the_model(ops in prop::collection::vec(op(), 0..60)) {
        let mut tree = Tree::new(10_000, 1 << 20);
        let mut model = Model::new();
        let mut layer = 0;
        for op in &ops {
            // Every byte of a path is one component.
            let split = |path: &Vec<u8>| path.iter().map(|b| vec![*b]).collect::<Vec<_>>();
            let result = match op {
                Op::Directory(path) | Op::File(path, _) | Op::Whiteout(path) | Op::Opaque(path) => {
                    let owned = split(path);
                    let path: Vec<&[u8]> = owned.iter().map(|name| &name[..]).collect();
                    match op {
                        Op::Directory(_) => tree.add_directory(&path, Metadata::default()),
                        Op::File(_, content) => {
                            tree.add(&path, Metadata::default(), Kind::File(*content))
                        }
                        Op::Whiteout(_) => tree.whiteout(&path),
                        _ => tree.opaque(&path),
                    }
                }
                Op::NextLayer => {
                    layer += 1;
                    tree.begin_layer();
                    Ok(())
                }
            };
            prop_assert_eq!(result.is_ok(), model_apply(&mut model, op, layer), "{:?}", op);
            let expected: BTreeMap<_, _> =
                model.iter().map(|(path, (_, content))| (path.clone(), *content)).collect();
            prop_assert_eq!(flatten(&tree), expected, "after {:?}", op);
        }
    }
}

#[test]
fn a_chain_of_symlinks_cannot_exceed_the_depth_limit() {
    let mut tree: Tree<()> = Tree::new(100_000, 64 << 20);
    let down: Vec<u8> = b"d/".repeat(400);
    tree.add(&[b"s"], Metadata::default(), Kind::Symlink(down.clone().into())).unwrap();
    let names: Vec<&[u8]> = vec![b"s", b"x"];
    tree.add(&names, Metadata::default(), Kind::Fifo).unwrap();
    let deep: Vec<u8> = [b"s/", &down[..]].concat();
    tree.add(&[b"t"], Metadata::default(), Kind::Symlink(deep.into())).unwrap();
    let error = tree.add(&[b"t", b"x"], Metadata::default(), Kind::Fifo).unwrap_err();
    assert!(matches!(error, TreeError::TooDeep { .. }), "{error}");
}

#[test]
fn whiteouts_that_visit_too_many_files_are_refused() {
    for deep in [false, true] {
        let mut tree: Tree<()> = Tree::new(10, 1 << 20);
        tree.begin_layer();
        for name in [b"a", b"b", b"c", b"d", b"e"] {
            let path = [&b"top"[..], b"dir", name];
            tree.add(&path, Metadata::default(), Kind::Fifo).unwrap();
        }
        // Removed from its parent, the directory itself is visited too.
        let path: &[&[u8]] = if deep { &[b"top", b"dir"] } else { &[b"top"] };
        for _ in 0..if deep { 8 } else { 6 } {
            tree.opaque(path).unwrap();
        }
        let error = tree.opaque(path).unwrap_err();
        assert_eq!(error, TreeError::TooManyVisits { limit: 40 });
        // Each layer has its own limit.
        tree.begin_layer();
        assert!(tree.lookup("top/dir/e").is_some());
        tree.whiteout(&[b"top"]).unwrap();
        assert!(tree.lookup("top").is_none());
    }
}

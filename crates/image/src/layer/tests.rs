//! Well-formed and hostile layers applied to the tree. The resulting images are checked with the
//! reference tools in `tests/`.

use std::io::{Cursor, Write};
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use tar::{Builder, EntryType, Header};

use super::*;
use crate::digest::Digest;
use crate::erofs::{DataArea, FileData};
use crate::tree::{Kind, Node, Tree};

const LIMITS: Limits = Limits { nodes: 10_000, metadata: 8 << 20, unpacked: 1 << 30 };

struct Image {
    tree: Tree<FileData>,
    out: DataArea,
    left: u64,
    limits: Limits,
    _dir: tempfile::TempDir,
}

impl Image {
    fn with(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let out = DataArea::create(&dir.path().join("image")).unwrap();
        let tree = Tree::new(limits.nodes, limits.metadata);
        Self { tree, out, left: limits.unpacked, limits, _dir: dir }
    }

    fn new() -> Self {
        Self::with(LIMITS)
    }

    fn raw(&mut self, blob: &[u8], diff_id: &Digest) -> Result<Applied, LayerError> {
        let Self { tree, out, left, limits, .. } = self;
        apply(Cursor::new(blob), Some(diff_id), tree, out, left, limits, &AtomicBool::new(false))
    }

    fn layer(&mut self, layer: Layer) -> Result<Applied, LayerError> {
        let blob = layer.bytes();
        self.raw(&blob, &Digest::of(&blob))
    }

    fn get(&self, path: &str) -> Option<&Node<FileData>> {
        self.tree.lookup(path)
    }

    fn size(&self, path: &str) -> u64 {
        match &self.get(path).unwrap_or_else(|| panic!("{path} is missing")).kind {
            Kind::File(data) => data.size,
            other => panic!("{path} is {other:?}"),
        }
    }
}

struct Layer(Builder<Vec<u8>>);

impl Layer {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    /// Names are written unchecked: the builder would refuse the hostile ones.
    fn entry(mut self, kind: EntryType, path: &[u8], link: &[u8], data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        header.set_mtime(1_000_000);
        let old = header.as_old_mut();
        old.name[..path.len()].copy_from_slice(path);
        old.linkname[..link.len()].copy_from_slice(link);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn device(mut self, path: &str, major: u32, minor: u32) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Char);
        header.set_path(path).unwrap();
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        header.set_size(0);
        header.set_cksum();
        self.0.append(&header, &[][..]).unwrap();
        self
    }

    fn file(self, path: &str, data: &[u8]) -> Self {
        self.entry(EntryType::Regular, path.as_bytes(), b"", data)
    }

    fn dir(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path.as_bytes(), b"", b"")
    }

    fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path.as_bytes(), target.as_bytes(), b"")
    }

    fn link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path.as_bytes(), target.as_bytes(), b"")
    }

    fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn error(layer: Layer) -> String {
    let error = Image::new().layer(layer).expect_err("the layer must be refused");
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

#[test]
fn a_path_with_dot_dot_is_refused_by_name() {
    for path in ["../etc/passwd", "a/../../b", "a/.."] {
        let text = error(Layer::new().file(path, b"x"));
        assert!(text.contains("..") && text.contains(path), "{text}");
    }
    assert!(error(Layer::new().file("a", b"").link("b", "../a")).contains("../a"));
}

#[test]
fn absolute_paths_are_relative_to_the_images_root() {
    let mut image = Image::new();
    image.layer(Layer::new().file("/a/b", b"x").file(".//c/./d", b"xy")).unwrap();
    assert_eq!(image.size("a/b"), 1);
    assert_eq!(image.size("c/d"), 2);
}

#[test]
fn symlinked_parents_are_followed_inside_the_image() {
    let mut image = Image::new();
    let layer = Layer::new()
        .dir("usr")
        .symlink("abs", "/usr")
        .symlink("up", "../../../../usr")
        .symlink("dangling", "/made/up")
        .file("abs/one", b"1")
        .file("up/two", b"22")
        .file("dangling/three", b"333");
    image.layer(layer).unwrap();
    assert_eq!(image.size("usr/one"), 1);
    assert_eq!(image.size("usr/two"), 2);
    assert_eq!(image.size("made/up/three"), 3);
    assert!(matches!(image.get("abs").unwrap().kind, Kind::Symlink(_)));
}

#[test]
fn symlink_loops_end_in_an_error() {
    let text = error(Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", b""));
    assert!(text.contains("too many symlinks"), "{text}");
    // Exponential growth: each target names the next link many times.
    let mut layer = Layer::new().symlink("l0", "/");
    for i in 1..12 {
        layer = layer.symlink(&format!("l{i}"), &format!("l{0}/l{0}/l{0}/l{0}", i - 1));
    }
    assert!(error(layer.file("l11/x", b"")).contains("too many symlinks"));
}

#[test]
fn the_last_component_is_replaced_and_not_followed() {
    let mut image = Image::new();
    image.layer(Layer::new().file("t", b"old").symlink("s", "t").file("s", b"new!")).unwrap();
    assert_eq!(image.size("t"), 3);
    assert_eq!(image.size("s"), 4);
}

#[test]
fn whiteouts_hide_lower_layers_only_in_any_order() {
    for whiteout_first in [true, false] {
        let mut image = Image::new();
        image.layer(Layer::new().file("d/low", b"1").file("f", b"1").file("g/x", b"1")).unwrap();
        let mut layer = Layer::new();
        if whiteout_first {
            layer = layer.file(".wh.f", b"").file("d/.wh..wh..opq", b"").file(".wh.g", b"");
        }
        layer = layer.file("f", b"22").file("d/high", b"22").file("g/y", b"22");
        if !whiteout_first {
            layer = layer.file(".wh.f", b"").file("d/.wh..wh..opq", b"").file(".wh.g", b"");
        }
        image.layer(layer).unwrap();
        assert_eq!(image.size("f"), 2);
        assert_eq!(image.size("d/high"), 2);
        assert_eq!(image.size("g/y"), 2);
        assert!(image.get("d/low").is_none());
        assert!(image.get("g/x").is_none());
        image.layer(Layer::new().file(".wh.f", b"").file(".wh.d", b"")).unwrap();
        assert!(image.get("f").is_none());
        assert!(image.get("d").is_none());
    }
}

#[test]
fn whiteouts_without_a_target_are_ignored_and_of_dots_are_refused() {
    let mut image = Image::new();
    image.layer(Layer::new().file(".wh.none", b"").file("no/dir/.wh.x", b"")).unwrap();
    assert!(image.get("no").is_none());
    for name in [".wh.", ".wh..", ".wh..."] {
        assert!(error(Layer::new().file(name, b"")).contains("whiteout"), "{name}");
    }
    // aufs metadata is skipped.
    let mut image = Image::new();
    image.layer(Layer::new().dir(".wh..wh.plnk").file(".wh..wh.plnk/1.2", b"x")).unwrap();
    assert!(image.get(".wh..wh.plnk").is_none());
}

#[test]
fn directories_merge_and_everything_else_replaces() {
    let mut image = Image::new();
    image.layer(Layer::new().dir("d").file("d/a", b"1").file("x", b"1").dir("y")).unwrap();
    let layer = Layer::new().dir("d").file("d/b", b"1").dir("x").file("y", b"22");
    image.layer(layer).unwrap();
    assert!(image.get("d/a").is_some() && image.get("d/b").is_some());
    assert!(matches!(image.get("x").unwrap().kind, Kind::Directory(_)));
    assert_eq!(image.size("y"), 2);
}

#[test]
fn hard_links_share_one_inode_across_layers() {
    let mut image = Image::new();
    image.layer(Layer::new().file("a", b"data").link("b", "/a").link("b", "a")).unwrap();
    image.layer(Layer::new().link("c", "b").file(".wh.a", b"")).unwrap();
    assert_eq!(image.get("c").unwrap().links, 2);
    assert_eq!(image.size("c"), 4);
    assert!(image.get("a").is_none());
}

#[test]
fn hard_links_to_missing_files_or_to_directories_are_refused() {
    let text = error(Layer::new().link("a", "/etc/shadow"));
    assert!(text.contains("etc/shadow") && text.contains("does not exist"), "{text}");
    assert!(error(Layer::new().dir("d").link("a", "d")).contains("directory"));
    assert!(error(Layer::new().link("a", "/")).contains("directory"));
}

#[test]
fn a_file_as_parent_is_refused() {
    let text = error(Layer::new().file("f", b"").file("f/x", b""));
    assert!(text.contains("not a directory"), "{text}");
}

#[test]
fn the_root_stays_a_directory() {
    let mut image = Image::new();
    image.layer(Layer::new().dir("./")).unwrap();
    assert_eq!(image.get("/").unwrap().metadata.mode, 0o644);
    assert!(error(Layer::new().file("/", b"")).contains("root"));
    assert!(error(Layer::new().symlink("./", "/etc")).contains("root"));
}

#[test]
fn device_nodes_are_kept_except_for_overlay_whiteouts() {
    let mut image = Image::new();
    image.layer(Layer::new().file("hidden", b"x").device("null", 1, 3)).unwrap();
    assert!(matches!(image.get("null").unwrap().kind, Kind::Char { rdev: 0x103 }));
    image.layer(Layer::new().device("hidden", 0, 0)).unwrap();
    assert!(image.get("hidden").is_none());
    assert!(error(Layer::new().device("big", 5000, 0)).contains("5000:0"));
}

#[test]
fn names_and_paths_have_the_limits_of_linux() {
    let long = "n".repeat(256);
    let layer = Layer::new().pax(&[("path", long.as_bytes())]).file("x", b"");
    assert!(error(layer).contains("256 bytes"));
    let deep = "d/".repeat(2048);
    let layer = Layer::new().pax(&[("path", deep.as_bytes())]).file("x", b"");
    assert!(error(layer).contains("4096 bytes"));
    let deep = "d/".repeat(600);
    let layer = Layer::new().pax(&[("path", deep.as_bytes())]).file("x", b"");
    assert!(error(layer).contains("deep"));
    let mut image = Image::new();
    let name = "n".repeat(255);
    image.layer(Layer::new().pax(&[("path", name.as_bytes())]).file("x", b"1")).unwrap();
    assert_eq!(image.size(&name), 1);
}

#[test]
fn extended_headers_have_a_memory_limit() {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(1 << 40);
    header.set_cksum();
    let text = error(Layer({
        let mut builder = Builder::new(Vec::new());
        builder.get_mut().write_all(header.as_bytes()).unwrap();
        builder
    }));
    assert!(text.contains("1099511627776"), "{text}");
    let mut layer = Layer::new();
    for _ in 0..20 {
        layer = layer.pax(&[("mtime", b"1")]);
    }
    assert!(error(layer.file("a", b"")).contains("extended headers"));
}

#[test]
fn attributes_are_kept_limited_and_filtered() {
    let mut image = Image::new();
    let layer = Layer::new()
        .pax(&[
            ("SCHILY.xattr.user.note", b"hello"),
            ("SCHILY.xattr.security.capability", b"\x01\0\0\x02"),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.strange.space", b"y"),
        ])
        .file("f", b"");
    assert_eq!(image.layer(layer).unwrap().dropped_xattrs, 2);
    let xattrs = &image.get("f").unwrap().metadata.xattrs;
    assert_eq!(xattrs.len(), 2);
    assert_eq!(xattrs[&b"user.note"[..]], b"hello");
    let huge = vec![b'x'; 70_000];
    let text = error(Layer::new().pax(&[("SCHILY.xattr.user.x", &huge)]).file("f", b""));
    assert!(text.contains("70000"), "{text}");
}

#[test]
fn limits_on_files_and_metadata_are_enforced() {
    let limits = Limits { nodes: 5, ..LIMITS };
    let mut layer = Layer::new();
    for _ in 0..10 {
        layer = layer.file("same", b"");
    }
    let error = Image::with(limits).layer(layer).unwrap_err();
    assert!(error.to_string().contains("more than 5 files"), "{error}");
    let limits = Limits { metadata: 4096, ..LIMITS };
    let mut layer = Layer::new();
    for i in 0..100 {
        layer = layer.symlink(&format!("s{i}"), "target");
    }
    let error = Image::with(limits).layer(layer).unwrap_err();
    assert!(error.to_string().contains("4096"), "{error}");
}

#[test]
fn repeated_opaque_whiteouts_over_a_full_directory_stop_at_the_limit() {
    let limits = Limits { nodes: 20, ..LIMITS };
    let mut layer = Layer::new();
    for i in 0..10 {
        layer = layer.file(&format!("d/{i}"), b"");
    }
    for _ in 0..9 {
        layer = layer.file("d/.wh..wh..opq", b"");
    }
    let error = Image::with(limits).layer(layer).unwrap_err();
    assert!(error.to_string().contains("more than 80 files"), "{error}");
}

#[test]
fn a_zip_bomb_stops_at_the_limit() {
    let limits = Limits { unpacked: 1 << 20, ..LIMITS };
    let tar = Layer::new().file("zeros", &vec![0; 16 << 20]).bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(&tar).unwrap();
    let blob = gzip.finish().unwrap();
    let error = Image::with(limits).raw(&blob, &Digest::of(&tar)).unwrap_err();
    assert!(matches!(error, LayerError::TooLarge { limit: 1_048_576 }), "{error}");
    let blob = zstd::encode_all(&tar[..], 19).unwrap();
    let error = Image::with(limits).raw(&blob, &Digest::of(&tar)).unwrap_err();
    assert!(matches!(error, LayerError::TooLarge { limit: 1_048_576 }), "{error}");
}

#[test]
fn a_sparse_file_counts_with_its_holes() {
    let size = (1u64 << 40).to_string();
    let layer = || {
        Layer::new()
            .pax(&[
                ("GNU.sparse.size", size.as_bytes()),
                ("GNU.sparse.numblocks", b"1"),
                ("GNU.sparse.map", b"4096,3"),
            ])
            .file("f", b"abc")
    };
    assert!(error(layer()).contains("unpacks to more than"));
}

#[test]
fn overlapping_or_wrong_sparse_maps_are_refused() {
    for map in ["0,3,1,3", "5,1", "0,3,9", "0,99", "18446744073709551615,3"] {
        let layer = Layer::new()
            .pax(&[("GNU.sparse.size", b"10"), ("GNU.sparse.map", map.as_bytes())])
            .file("f", b"abc");
        assert!(error(layer).contains("sparse"), "{map}");
    }
}

#[test]
fn a_wrong_diff_id_is_detected() {
    let blob = Layer::new().file("a", b"x").bytes();
    let error = Image::new().raw(&blob, &Digest::of(b"else")).unwrap_err();
    assert!(matches!(error, LayerError::DiffId { .. }), "{error}");
}

#[test]
fn truncated_layers_are_refused() {
    let tar = Layer::new().file("a", &[7; 5000]).bytes();
    for cut in [100, 512, 513, 3000] {
        let blob = &tar[..cut];
        let result = Image::new().raw(blob, &Digest::of(blob));
        assert!(result.is_err(), "cut at {cut}");
    }
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let blob = gzip.finish().unwrap();
    let result = Image::new().raw(&blob[..blob.len() - 9], &Digest::of(&tar));
    assert!(result.is_err());
}

#[test]
fn gzip_zstd_and_plain_give_the_same_tree() {
    let tar = Layer::new().file("a", &[7; 5000]).bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    for blob in [tar.clone(), gzip.finish().unwrap(), zstd::encode_all(&tar[..], 3).unwrap()] {
        let mut image = Image::new();
        image.raw(&blob, &Digest::of(&tar)).unwrap();
        assert_eq!(image.size("a"), 5000);
    }
}

#[test]
fn owners_beyond_thirty_two_bits_are_refused() {
    let layer = Layer::new().pax(&[("uid", b"4294967296")]).file("f", b"");
    assert!(error(layer).contains("4294967296"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Mutation: a valid archive with some bytes changed.
    #[test]
    fn a_corrupted_layer_never_panics(
        changes in prop::collection::vec((0usize..8192, any::<u8>()), 1..20),
        fix_checksums in any::<bool>(),
    ) {
        let mut tar = Layer::new()
            .dir("d")
            .pax(&[("path", b"d/long"), ("SCHILY.xattr.user.a", b"b"),
                ("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.realsize", b"4096")])
            .file("x", &{ let mut v = b"1\n0\n3\n".to_vec(); v.resize(512, 0); v.extend(b"abc"); v })
            .symlink("s", "d")
            .link("l", "d/long")
            .file("s/.wh.long", b"")
            .bytes();
        for (at, byte) in changes {
            let length = tar.len();
            tar[at % length] = byte;
        }
        if fix_checksums {
            for block in tar.chunks_exact_mut(512) {
                let mut header = Header::new_old();
                header.as_mut_bytes().copy_from_slice(block);
                header.set_cksum();
                block.copy_from_slice(header.as_bytes());
            }
        }
        let _ = Image::new().raw(&tar, &Digest::of(&tar));
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        let _ = Image::new().raw(&bytes, &Digest::of(&bytes));
    }
}

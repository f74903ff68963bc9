//! Which file of a crate uses which other one. Reads tokens, so paths inside of macros count as well; it
//! knows modules, imports and re-exports, but no types, so a method call is not a use of the method's file.
//!
//! - A use is a path to an item: in an import, in a signature or in a body.
//! - A re-export (`pub use`) is no use by the module that has it. Who imports the name from there uses the
//!   file that defines it. So a parent may re-export its children, and the children may use the parent.
//! - Code for tests (`#[cfg(test)]`) does not count, nor do declarations of modules.
//! - An inline module belongs to its file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, anyhow};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// From file to file, with one of the names that the first takes from the second.
pub(crate) type Uses = BTreeMap<(PathBuf, PathBuf), String>;

/// The segments of a path: of a module from the crate's root, or as written in the source.
type Segments = Vec<String>;

/// How many imports of imports are followed. A path that needs more, such as `use name::name` of another
/// crate, is none of this crate.
const MAX_IMPORTS: usize = 16;

#[derive(Default)]
struct Module {
    file: PathBuf,
    defined: BTreeSet<String>,
    imported: BTreeMap<String, Import>,
    globs: Vec<Segments>,
    paths: BTreeSet<Segments>,
    /// Single names, among which are re-exported ones that the module also uses itself.
    names: BTreeSet<String>,
}

struct Import {
    path: Segments,
    reexport: bool,
}

/// The uses among the files of the crate with this root file. `read` returns the text of a file.
pub(crate) fn of_crate(root: &Path, read: &dyn Fn(&Path) -> Option<String>) -> Result<Uses> {
    let mut modules = Modules { by_path: BTreeMap::new(), read };
    let dir = root.parent().context("a root file without a folder")?;
    modules.read_file(Vec::new(), root, dir)?;
    Ok(modules.uses())
}

struct Modules<'a> {
    by_path: BTreeMap<Segments, Module>,
    read: &'a dyn Fn(&Path) -> Option<String>,
}

impl Modules<'_> {
    /// `children` is the folder of the files of its modules.
    fn read_file(&mut self, path: Segments, file: &Path, children: &Path) -> Result<()> {
        let text =
            (self.read)(file).with_context(|| format!("{}: no such file", file.display()))?;
        let tokens = TokenStream::from_str(&text)
            .map_err(|error| anyhow!("{}: not Rust: {error}", file.display()))?;
        self.read_module(path, file, children, tokens)
    }

    fn read_module(
        &mut self,
        path: Segments,
        file: &Path,
        children: &Path,
        tokens: TokenStream,
    ) -> Result<()> {
        let mut module = Module { file: file.to_owned(), ..Module::default() };
        let declared = module.scan(tokens, true);
        self.by_path.insert(path.clone(), module);
        for (name, body) in declared {
            let mut child = path.clone();
            child.push(name.clone());
            let below = children.join(&name);
            if let Some(tokens) = body {
                self.read_module(child, file, &below, tokens)?;
                continue;
            }
            let beside = children.join(format!("{name}.rs"));
            let file = if (self.read)(&beside).is_some() { beside } else { below.join("mod.rs") };
            self.read_file(child, &file, &below)?;
        }
        Ok(())
    }

    fn uses(&self) -> Uses {
        let mut uses = Uses::new();
        for (path, module) in &self.by_path {
            let imports = module.imported.iter().filter_map(|(name, import)| {
                // Where the module only passes a name on, its users use it.
                (!import.reexport || module.names.contains(name)).then_some(&import.path)
            });
            let written = imports.chain(&module.paths).filter_map(|written| {
                self.file_of(&self.absolute(path, written, 0)?, 0).map(|file| (written, file))
            });
            for (written, file) in written {
                self.add(module, file, written.join("::"), &mut uses);
            }
            for name in &module.names {
                if let Some(file) = self.through_globs(path, std::slice::from_ref(name), 0) {
                    self.add(module, file, name.clone(), &mut uses);
                }
            }
        }
        uses
    }

    fn add(&self, module: &Module, file: &Path, name: String, uses: &mut Uses) {
        if module.file != file {
            uses.entry((module.file.clone(), file.to_owned())).or_insert(name);
        }
    }

    /// A path as written in `module`, from the crate's root. None if it leads out of the crate.
    fn absolute(&self, module: &[String], written: &[String], depth: usize) -> Option<Segments> {
        if depth > MAX_IMPORTS {
            return None;
        }
        let mut base = module.to_vec();
        let mut rest = written;
        match written.first()?.as_str() {
            "crate" => {
                base.clear();
                rest = &written[1..];
            }
            "self" => rest = &written[1..],
            "super" => {}
            first => {
                base.push(first.to_owned());
                let child = self.by_path.contains_key(&base);
                base.pop();
                if !child {
                    let import = self.by_path.get(module)?.imported.get(first)?;
                    base = self.absolute(module, &import.path, depth + 1)?;
                    rest = &written[1..];
                }
            }
        }
        while let [first, others @ ..] = rest
            && first == "super"
        {
            base.pop()?;
            rest = others;
        }
        base.extend_from_slice(rest);
        Some(base)
    }

    /// The file that defines the item of this path. None for a module, and for what another crate defines.
    fn file_of(&self, path: &[String], depth: usize) -> Option<&Path> {
        if depth > MAX_IMPORTS {
            return None;
        }
        let length = (0..=path.len()).rev().find(|end| self.by_path.contains_key(&path[..*end]))?;
        let (at, item) = path.split_at(length);
        let (name, rest) = item.split_first()?;
        let module = &self.by_path[at];
        if module.defined.contains(name) {
            return Some(&module.file);
        }
        if let Some(import) = module.imported.get(name) {
            let mut path = self.absolute(at, &import.path, 0)?;
            path.extend_from_slice(rest);
            return self.file_of(&path, depth + 1);
        }
        // What is not found at all was made by a macro.
        self.through_globs(at, item, depth).or(Some(&module.file))
    }

    fn through_globs(&self, module: &[String], item: &[String], depth: usize) -> Option<&Path> {
        let here = &self.by_path[module];
        if here.defined.contains(&item[0]) || here.imported.contains_key(&item[0]) {
            return None;
        }
        here.globs.iter().find_map(|glob| {
            let mut path = self.absolute(module, glob, 0)?;
            let target = self.by_path.get(&path)?;
            path.push(item[0].clone());
            let has = target.defined.contains(&item[0])
                || target.imported.contains_key(&item[0])
                || self.by_path.contains_key(&path);
            path.extend_from_slice(&item[1..]);
            has.then(|| self.file_of(&path, depth + 1)).flatten()
        })
    }
}

impl Module {
    /// Returns the modules that the tokens declare, with the body of an inline one. `items` says whether
    /// they stand in the module itself, and not in a body or a signature.
    fn scan(&mut self, tokens: TokenStream, items: bool) -> Vec<(String, Option<TokenStream>)> {
        let trees: Vec<TokenTree> = tokens.into_iter().collect();
        let mut declared = Vec::new();
        let mut at = 0;
        // The last visibility is that of the item at hand.
        let mut public = false;
        while at < trees.len() {
            if let Some((length, test)) = attribute(&trees[at..]) {
                at += length;
                if test {
                    at += item_length(&trees[at..]);
                }
                continue;
            }
            let TokenTree::Ident(ident) = &trees[at] else {
                if let TokenTree::Group(group) = &trees[at] {
                    // `pub(crate)` is one visibility.
                    public &= group.delimiter() == Delimiter::Parenthesis;
                    self.scan(group.stream(), false);
                } else {
                    public = false;
                }
                at += 1;
                continue;
            };
            let (word, next) = (ident.to_string(), trees.get(at + 1));
            match (word.as_str(), next) {
                ("pub", _) => {
                    public = true;
                    at += 1;
                    continue;
                }
                ("use", Some(next)) if !is_punct(next, '<') => {
                    let length = trees[at..].iter().take_while(|tree| !is_punct(tree, ';')).count();
                    self.import(&trees[at + 1..at + length], &[], public);
                    at += length;
                }
                ("mod", Some(TokenTree::Ident(name))) if items => {
                    let body = match trees.get(at + 2) {
                        Some(TokenTree::Group(group)) => Some(group.stream()),
                        _ => None,
                    };
                    declared.push((name.to_string(), body));
                    at += 3;
                }
                ("fn" | "struct" | "enum" | "union" | "trait" | "type" | "const" | "static", _)
                    if items =>
                {
                    if let Some(TokenTree::Ident(name)) = next {
                        self.defined.insert(name.to_string());
                    }
                    at += 1;
                }
                ("macro_rules", _) => {
                    if let Some(TokenTree::Ident(name)) = trees.get(at + 2) {
                        self.defined.insert(name.to_string());
                    }
                    at += 3;
                }
                _ => at += self.path(&trees, at),
            }
            public = false;
        }
        declared
    }

    /// Records the path that starts at an identifier, and returns its length in tokens.
    fn path(&mut self, trees: &[TokenTree], start: usize) -> usize {
        let mut segments = vec![trees[start].to_string()];
        let mut at = start + 1;
        while let [a, b, TokenTree::Ident(name), ..] = &trees[at..]
            && is_punct(a, ':')
            && is_punct(b, ':')
        {
            segments.push(name.to_string());
            at += 3;
        }
        let before = start.checked_sub(1).map(|before| &trees[before]);
        let starts = !before.is_some_and(|before| {
            // The rest of a longer path, a field, a lifetime, a variable of a macro.
            let colon = is_punct(before, ':')
                && start.checked_sub(2).is_some_and(|before| is_punct(&trees[before], ':'));
            let variable = is_punct(before, '$') && segments[0] != "crate";
            colon || variable || is_punct(before, '\'') || is_field(trees, start)
        });
        if starts && segments.len() > 1 {
            self.paths.insert(segments);
        } else if starts {
            self.names.append(&mut segments.into_iter().collect());
        }
        at - start
    }

    fn import(&mut self, trees: &[TokenTree], prefix: &[String], reexport: bool) {
        for tree in trees.split(|tree| is_punct(tree, ',')) {
            // `use ::name` is of another crate.
            if tree.first().is_none_or(|first| is_punct(first, ':')) {
                continue;
            }
            let mut path = prefix.to_vec();
            let mut alias = None;
            let mut rest = tree.iter();
            let mut whole = true;
            while let Some(token) = rest.next() {
                match token {
                    TokenTree::Ident(word) if word == "as" => {
                        alias = rest.next().map(ToString::to_string);
                    }
                    TokenTree::Ident(word) if word == "self" && !path.is_empty() => {}
                    TokenTree::Ident(word) => path.push(word.to_string()),
                    TokenTree::Group(group) => {
                        let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                        self.import(&inner, &path, reexport);
                        whole = false;
                    }
                    TokenTree::Punct(star) if star.as_char() == '*' => {
                        self.globs.push(path.clone());
                        whole = false;
                    }
                    _ => {}
                }
            }
            if let Some(name) = alias.or_else(|| path.last().cloned())
                && whole
            {
                self.imported.insert(name, Import { path, reexport });
            }
        }
    }
}

fn is_punct(tree: &TokenTree, char: char) -> bool {
    matches!(tree, TokenTree::Punct(punct) if punct.as_char() == char)
}

/// Whether the identifier follows a single dot (`..` is a range).
fn is_field(trees: &[TokenTree], at: usize) -> bool {
    is_punct(&trees[at - 1], '.') && !(at > 1 && is_punct(&trees[at - 2], '.'))
}

/// The length of the attribute that starts here, and whether it reserves its item for tests.
fn attribute(trees: &[TokenTree]) -> Option<(usize, bool)> {
    if !is_punct(trees.first()?, '#') {
        return None;
    }
    let length = if is_punct(trees.get(1)?, '!') { 3 } else { 2 };
    let TokenTree::Group(group) = trees.get(length - 1)? else { return None };
    let text: String = group.stream().to_string().split_whitespace().collect();
    Some((length, text == "cfg(test)" || text.starts_with("cfg(all(test,")))
}

/// The length of the item, statement or field that starts here, with its attributes.
fn item_length(trees: &[TokenTree]) -> usize {
    let mut at = 0;
    while let Some((length, _)) = attribute(&trees[at..]) {
        at += length;
    }
    let first = trees[at..].iter().find_map(|tree| match tree {
        TokenTree::Ident(word) if word != "pub" => Some(word.to_string()),
        _ => None,
    });
    // A field ends with a comma; an item may have one between its type parameters.
    let field = !matches!(
        first.as_deref(),
        Some(
            "fn" | "struct"
                | "enum"
                | "trait"
                | "type"
                | "const"
                | "static"
                | "impl"
                | "use"
                | "mod"
                | "async"
                | "unsafe"
                | "extern"
                | "let"
                | "macro_rules"
        )
    );
    let statement = matches!(first.as_deref(), Some("use" | "let"));
    for (index, tree) in trees[at..].iter().enumerate() {
        let braces =
            matches!(tree, TokenTree::Group(group) if group.delimiter() == Delimiter::Brace);
        if is_punct(tree, ';') || braces && !statement || field && is_punct(tree, ',') {
            return at + index + 1;
        }
    }
    trees.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uses(files: &[(&str, &str)]) -> Vec<String> {
        let read = |path: &Path| {
            let file = files.iter().find(|(name, _)| Path::new(name) == path);
            file.map(|(_, text)| (*text).to_owned())
        };
        let uses = of_crate(Path::new(files[0].0), &read).unwrap();
        uses.keys().map(|(from, to)| format!("{} -> {}", from.display(), to.display())).collect()
    }

    #[test]
    fn imports_and_paths_are_uses_of_the_file_that_defines_the_item() {
        let files = [
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b::{B, deep::D as Other}; fn f() { super::c::f() }"),
            ("b.rs", "pub mod deep; pub struct B;"),
            ("b/deep.rs", "pub struct D;"),
            ("c.rs", "pub fn f() {}"),
        ];
        assert_eq!(uses(&files), ["a.rs -> b/deep.rs", "a.rs -> b.rs", "a.rs -> c.rs"]);
    }

    #[test]
    fn a_reexport_is_a_use_of_the_defining_file_by_those_who_import_it() {
        let files = [
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "use crate::b::{Thing, Other};"),
            ("b/mod.rs", "mod inner; mod outer; pub use inner::Thing; pub(crate) use outer::*;"),
            ("b/inner.rs", "pub struct Thing;"),
            ("b/outer.rs", "use super::Thing; pub struct Other;"),
        ];
        assert_eq!(
            uses(&files),
            ["a.rs -> b/inner.rs", "a.rs -> b/outer.rs", "b/outer.rs -> b/inner.rs"]
        );
    }

    #[test]
    fn a_reexported_name_that_the_module_uses_itself_is_a_use() {
        let files = [
            ("lib.rs", "mod a; pub use a::A; pub struct Whole { a: A }"),
            ("a.rs", "use crate::Whole; pub struct A;"),
        ];
        assert_eq!(uses(&files), ["a.rs -> lib.rs", "lib.rs -> a.rs"]);
    }

    #[test]
    fn an_imported_module_is_used_where_something_of_it_is_named() {
        let files = [
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "use crate::b; use b::inner; fn f() { inner::g(); }"),
            ("b.rs", "pub mod inner; pub fn f() {}"),
            ("b/inner.rs", "pub fn g() { super::f() }"),
        ];
        assert_eq!(uses(&files), ["a.rs -> b/inner.rs", "b/inner.rs -> b.rs"]);
    }

    #[test]
    fn inline_modules_and_macros_belong_to_their_file() {
        let files = [
            ("lib.rs", "mod a; mod b; pub struct Root;"),
            (
                "a.rs",
                "mod inside { use super::super::Root; } fn f() { matches!(x, crate::b::B::C) }",
            ),
            ("b.rs", "pub enum B { C }"),
        ];
        assert_eq!(uses(&files), ["a.rs -> b.rs", "a.rs -> lib.rs"]);
    }

    #[test]
    fn tests_other_crates_and_fields_are_no_uses() {
        let files = [
            ("lib.rs", "mod a; mod b;"),
            (
                "a.rs",
                "use std::b::B; use ::b::B as C; use b::b;\
                 #[cfg(test)] use crate::b::{f, g};\
                 #[cfg(test)] mod tests { use crate::b::f; }\
                 struct S { #[cfg(test)] x: crate::b::B, y: u8 }\
                 fn h(s: S) { s.b::<u8>(); Vec::<u8>::b::f() }",
            ),
            ("b.rs", "pub fn f() {}"),
        ];
        assert_eq!(uses(&files), [""; 0]);
    }

    #[test]
    fn what_follows_a_test_counts_again() {
        let files = [
            (
                "lib.rs",
                "mod a; mod b; struct S { #[cfg(test)] x: a::A, y: b::B }\
                 #[cfg(test)] fn f<A, B>() { a::f() } fn g() { b::f() }",
            ),
            ("a.rs", "pub struct A;"),
            ("b.rs", "pub struct B;"),
        ];
        assert_eq!(uses(&files), ["lib.rs -> b.rs"]);
    }

    #[test]
    fn a_missing_file_is_an_error_with_its_name() {
        let read = |path: &Path| (path == Path::new("src/lib.rs")).then(|| "mod a;".to_owned());
        let error = of_crate(Path::new("src/lib.rs"), &read).unwrap_err();
        assert_eq!(error.to_string(), "src/a/mod.rs: no such file");
    }
}

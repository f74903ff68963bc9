//! Paths in layers: bytes, relative to the image's root.

/// PATH_MAX of Linux without the terminating NUL.
pub const MAX_PATH: usize = 4095;
/// NAME_MAX of Linux and of EROFS.
pub const MAX_NAME: usize = 255;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PathError {
    #[error("path {0:?} has a `..` component")]
    DotDot(String),
    #[error("path {path:?} is {length} bytes long, more than {MAX_PATH}")]
    TooLong { path: String, length: usize },
    #[error("name {name:?} is {length} bytes long, more than {MAX_NAME}")]
    NameTooLong { name: String, length: usize },
    #[error("path {0:?} has a NUL byte")]
    ZeroByte(String),
}

/// Components of `path`. Leading and repeated slashes and `.` are dropped, so absolute paths are
/// relative to the image's root.
pub fn split(path: &[u8]) -> Result<Vec<&[u8]>, PathError> {
    if path.len() > MAX_PATH {
        return Err(PathError::TooLong { path: shown(path), length: path.len() });
    }
    if path.contains(&0) {
        return Err(PathError::ZeroByte(shown(path)));
    }
    let mut components = Vec::new();
    for component in path.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err(PathError::DotDot(shown(path))),
            name if name.len() > MAX_NAME => {
                return Err(PathError::NameTooLong { name: shown(name), length: name.len() });
            }
            name => components.push(name),
        }
    }
    Ok(components)
}

/// The path for messages.
pub fn display(components: &[&[u8]]) -> String {
    shown(&components.join(&b'/'))
}

/// A path shortened for messages, so that an image cannot flood the log with long names.
pub fn shown(path: &[u8]) -> String {
    const SHOWN: usize = 128;
    match path.get(..SHOWN) {
        Some(start) => format!("{}...", String::from_utf8_lossy(start)),
        None => String::from_utf8_lossy(path).into_owned(),
    }
}

//! Directory blocks: fixed-size entries at the start of each block, followed by their names, all
//! sorted bytewise (the kernel uses binary search; `.` and `..` are sorted too).

use super::format::{BLOCK, DIRENT_SIZE};

/// Name, nid and type of an entry.
pub struct Entry<'a> {
    pub name: &'a [u8],
    pub nid: u64,
    pub kind: u8,
}

/// Byte length of a directory with these names, in this order.
pub fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let mut full = 0;
    let mut used = 0;
    for name in names {
        let need = DIRENT_SIZE + name.len();
        if used + need > BLOCK {
            full += BLOCK as u64;
            used = 0;
        }
        used += need;
    }
    full + used as u64
}

/// The directory's content; its length is [`size`].
pub fn encode(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let count = rest
            .iter()
            .take_while(|entry| {
                used += DIRENT_SIZE + entry.name.len();
                used <= BLOCK
            })
            .count();
        let (block, next) = rest.split_at(count);
        // Only the last block may be partial.
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        let mut name_offset = count * DIRENT_SIZE;
        for entry in block {
            out.extend_from_slice(&entry.nid.to_le_bytes());
            out.extend_from_slice(&(name_offset as u16).to_le_bytes());
            out.extend_from_slice(&[entry.kind, 0]);
            name_offset += entry.name.len();
        }
        for entry in block {
            out.extend_from_slice(entry.name);
        }
        rest = next;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_equals_the_encoded_length() {
        for count in [1, 2, 13, 14, 15, 16, 400] {
            let names: Vec<Vec<u8>> =
                (0..count).map(|i| format!("{i:0>width$}", width = 1 + i % 255).into()).collect();
            let entries: Vec<_> =
                names.iter().map(|name| Entry { name, nid: 7, kind: 1 }).collect();
            assert_eq!(encode(&entries).len() as u64, size(names.iter().map(|n| &n[..])));
        }
    }

    #[test]
    fn no_entry_crosses_a_block() {
        let names: Vec<_> = (0..100).map(|i| format!("{i:0>255}")).collect();
        let entries: Vec<_> =
            names.iter().map(|n| Entry { name: n.as_bytes(), nid: 1, kind: 1 }).collect();
        let bytes = encode(&entries);
        // 15 entries of 12 + 255 bytes fit into a block.
        assert_eq!(bytes.len(), 6 * BLOCK + 10 * 267);
        for block in bytes.chunks(BLOCK) {
            let first_name = usize::from(u16::from_le_bytes([block[8], block[9]]));
            assert_eq!(first_name % DIRENT_SIZE, 0);
            assert!(first_name / DIRENT_SIZE <= 15);
        }
    }
}

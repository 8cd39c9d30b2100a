//! An initramfs: the `newc` format of cpio (kernel documentation, driver-api/early-userspace/buffer-format.rst).

/// Entries in the order in which they are added; a directory comes before what is in it.
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_755;
const ALIGNMENT: usize = 4;
const END: &str = "TRAILER!!!";

impl Archive {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), entries: 0 }
    }

    pub(super) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY, &[]);
    }

    /// That anyone may execute.
    pub(super) fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, FILE, content);
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry(END, 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let length = |bytes: usize| u32::try_from(bytes).expect("what goes into an initramfs is below 4 GiB");
        // Inode, mode, user, group, links, time, size, four device numbers, length of the name with its NUL, checksum.
        let fields =
            [self.entries, mode, 0, 0, 1, 0, length(content.len()), 0, 0, 0, 0, length(path.len() + 1), 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_contents_are_padded_to_words() {
        let mut archive = Archive::new();
        archive.directory("vm");
        archive.file("vm/a", b"hello");
        let bytes = archive.finish();
        let text = String::from_utf8(bytes).unwrap();
        let header = |inode: u32, mode: u32, size: usize, name: usize| {
            format!("070701{inode:08x}{mode:08x}{:024x}{:08x}{size:08x}{:032x}{name:08x}{:08x}", 1, 0, 0, 0)
        };
        let expected = [
            header(1, DIRECTORY, 0, 3) + "vm\0\0\0\0",
            header(2, FILE, 5, 5) + "vm/a\0\0" + "hello\0\0\0",
            header(3, 0, 0, 11) + "TRAILER!!!\0\0\0\0",
        ];
        assert_eq!(text, expected.concat());
    }
}

//! Bytes of a response to objects, as they come: of a list of 500 pods, one pod is in memory at a time.

use serde::Deserialize;

use super::fault::Garbage;

/// Longer than any object: etcd takes 1.5 MiB, and what is nested in a list has no more to it.
const LIMIT: usize = 8 << 20;

/// Takes the elements of `items` out of a list.
#[derive(Debug, Default)]
pub(super) struct Elements {
    /// The list without its elements.
    envelope: Vec<u8>,
    element: Vec<u8>,
    within: Within,
    /// Objects and arrays that are open, the list itself included.
    depth: usize,
    text: Text,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Within {
    #[default]
    Envelope,
    /// The array `items`, between two elements.
    Items,
    Element,
}

/// Brackets inside a string are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Text {
    #[default]
    Outside,
    Inside,
    Escaped,
}

/// What a list says beside its elements.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Envelope {
    pub(super) metadata: Version,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Version {
    pub(super) resource_version: String,
    /// Names the next page; empty on the last.
    #[serde(default)]
    pub(super) r#continue: String,
}

impl Elements {
    /// Gives every element that is complete now to `each`.
    ///
    /// # Errors
    /// What `each` says, or an element that has no end.
    pub(super) fn push(
        &mut self,
        bytes: &[u8],
        mut each: impl FnMut(&[u8]) -> Result<(), Garbage>,
    ) -> Result<(), Garbage> {
        for &byte in bytes {
            let closes = self.step(byte);
            match self.within {
                Within::Envelope => self.envelope.push(byte),
                Within::Items => {}
                Within::Element => {
                    self.element.push(byte);
                    if closes && self.depth == ELEMENTS {
                        each(&self.element)?;
                        self.element.clear();
                        self.within = Within::Items;
                    }
                }
            }
            if self.element.len().max(self.envelope.len()) > LIMIT {
                return Err(Garbage::TooLong { limit: LIMIT });
            }
        }
        Ok(())
    }

    /// # Errors
    /// A list that ended too early, or was none.
    pub(super) fn finish(self) -> Result<Envelope, Garbage> {
        serde_json::from_slice(&self.envelope).map_err(|error| Garbage::NoList { error })
    }

    /// Follows the structure; returns whether the byte closes a bracket.
    fn step(&mut self, byte: u8) -> bool {
        self.text = match (self.text, byte) {
            (Text::Inside, b'\\') => Text::Escaped,
            (Text::Inside, b'"') => Text::Outside,
            (Text::Inside | Text::Escaped, _) => Text::Inside,
            (Text::Outside, b'"') => Text::Inside,
            (Text::Outside, b'{' | b'[') => {
                self.open(byte);
                Text::Outside
            }
            (Text::Outside, b'}' | b']') => {
                self.depth = self.depth.saturating_sub(1);
                if self.within == Within::Items {
                    self.within = Within::Envelope;
                }
                return true;
            }
            (Text::Outside, _) => Text::Outside,
        };
        false
    }

    fn open(&mut self, byte: u8) {
        self.depth += 1;
        if self.within == Within::Items {
            self.within = Within::Element;
        } else if byte == b'[' && self.within == Within::Envelope && self.depth == ELEMENTS {
            let before = self.envelope.trim_ascii_end();
            let key = before.strip_suffix(b":").map_or(&[][..], <[u8]>::trim_ascii_end);
            if key.ends_with(b"\"items\"") {
                self.envelope.push(byte);
                self.within = Within::Items;
            }
        }
    }
}

/// The depth of the array `items`.
const ELEMENTS: usize = 2;

/// Takes the lines of a watch apart.
#[derive(Debug, Default)]
pub(super) struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// Gives every line that is complete now to `each`; empty ones are left out.
    ///
    /// # Errors
    /// What `each` says, or a line that has no end.
    pub(super) fn push<E: From<Garbage>>(
        &mut self,
        bytes: &[u8],
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.rest.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = self.rest.trim_ascii();
                if !line.is_empty() {
                    each(line)?;
                }
                self.rest.clear();
            }
        }
        if self.rest.len() > LIMIT {
            return Err(Garbage::TooLong { limit: LIMIT }.into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = r#"{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"7","continue":"x"},
        "items" : [ {"a":"]}\"[{","b":[{"items":[1]}]} ,{"c":{}},
        {}],"more":{"items":["kept"]}}"#;

    /// The elements, and what the list says of itself, given in pieces of `size` bytes.
    fn elements(text: &str, size: usize) -> (Vec<String>, Result<Envelope, Garbage>) {
        let (mut elements, mut seen) = (Elements::default(), Vec::new());
        for piece in text.as_bytes().chunks(size) {
            let each = |element: &[u8]| {
                seen.push(String::from_utf8(element.into()).unwrap());
                Ok(())
            };
            elements.push(piece, each).unwrap();
        }
        (seen, elements.finish())
    }

    #[test]
    fn elements_come_out_whole_however_the_bytes_are_cut() {
        for size in 1..LIST.len() {
            let (seen, envelope) = elements(LIST, size);
            assert_eq!(seen, [r#"{"a":"]}\"[{","b":[{"items":[1]}]}"#, r#"{"c":{}}"#, "{}"], "{size}");
            let Version { resource_version, r#continue } = envelope.unwrap().metadata;
            assert_eq!((&*resource_version, &*r#continue), ("7", "x"));
        }
    }

    #[test]
    fn lists_without_elements_and_what_is_no_list() {
        for items in ["[]", "null", "[ ]"] {
            let text = format!(r#"{{"items":{items},"metadata":{{"resourceVersion":"1"}}}}"#);
            let (seen, envelope) = elements(&text, 3);
            assert_eq!((seen.len(), envelope.unwrap().metadata.r#continue), (0, String::new()));
        }
        for text in ["", "<html>", "{}", &LIST[..LIST.len() - 1], &LIST[..150], "]]]]", "[[[{]"] {
            let (_, envelope) = elements(text, 10);
            assert!(matches!(envelope, Err(Garbage::NoList { .. })), "{text}");
        }
    }

    #[test]
    fn lines_come_out_whole_however_the_bytes_are_cut() {
        let text = b"{\"a\":1}\n\r\n{\"b\":2}\r\n{\"cut";
        for size in 1..text.len() {
            let (mut lines, mut seen) = (Lines::default(), Vec::new());
            for piece in text.chunks(size) {
                let each = |line: &[u8]| {
                    seen.push(String::from_utf8(line.into()).unwrap());
                    Ok::<_, Garbage>(())
                };
                lines.push(piece, each).unwrap();
            }
            assert_eq!(seen, ["{\"a\":1}", "{\"b\":2}"], "{size}");
        }
    }

    #[test]
    fn what_has_no_end_is_not_kept() {
        let endless = vec![b'x'; LIMIT / 4];
        let mut lines = Lines::default();
        let outcome = (0..5).try_for_each(|_| lines.push(&endless, |_| Ok::<_, Garbage>(())));
        assert!(matches!(outcome, Err(Garbage::TooLong { .. })));
        let mut elements = Elements::default();
        elements.push(b"{\"items\":[{\"a\":\"", |_| Ok(())).unwrap();
        let outcome = (0..5).try_for_each(|_| elements.push(&endless, |_| Ok(())));
        assert!(matches!(outcome, Err(Garbage::TooLong { .. })));
    }
}

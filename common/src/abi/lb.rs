//! The load-balancing tables: a frontend names a range of slots, a slot names a backend.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::addr::{Addr, Port, Proto};

/// What a client addresses. One hash lookup by this key decides whether a packet is for a service.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct FrontendKey {
    pub addr: Addr,
    pub port: Port,
    pub proto: Proto,
    /// [`FrontendKey::ANY`], or later the traffic that a policy tells apart.
    pub scope: u8,
}

impl FrontendKey {
    /// The entry serves traffic from anywhere.
    pub const ANY: u8 = 0;
}

/// Where a frontend's slots are. Replaced as a whole, so a program sees the old range or the new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Frontend {
    pub service: u32,
    /// First slot.
    pub offset: u32,
    /// Number of slots; 0 means that [`Frontend::flags`] says what happens instead.
    pub length: u32,
    pub flags: u32,
    /// Seconds that a client keeps its backend; 0 without session affinity.
    pub affinity: u32,
}

impl Frontend {
    /// Without slots: answer with RST or port unreachable (rule 14). Unset: drop (rule 15).
    pub const REJECT: u32 = 1;
}

/// The index of a backend; 0 is no backend, which is what a fresh array holds.
pub type Slot = u32;

/// One endpoint of one service port. A row that slots may name is never rewritten: it is released by a new
/// generation, rests for a grace period and may then serve another endpoint. A flow that remembers (index,
/// generation) therefore learns at its next packet that its backend is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Backend {
    pub addr: Addr,
    pub port: Port,
    pub proto: Proto,
    pub flags: u8,
    pub generation: u32,
    pub service: u32,
    pub reserved: u32,
}

impl Backend {
    /// The row is in use.
    pub const LIVE: u8 = 1;
}

/// Who a service id is, as `namespace/name:port`, ended by zeros. Each of the three is a DNS label of at most 63 bytes
/// (RFC 1123), and an unnamed port leaves out the colon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ServiceName {
    pub text: [u8; 192],
}

impl ServiceName {
    /// `None` where the text is longer than the field.
    pub fn new(text: &str) -> Option<Self> {
        let mut bytes = [0; 192];
        bytes.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
        Some(Self { text: bytes })
    }

    /// The text, or `None` where another writer left bytes that are not UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        let end = self.text.iter().position(|&byte| byte == 0).unwrap_or(self.text.len());
        core::str::from_utf8(self.text.get(..end)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_name_fits_or_is_refused() {
        let longest = core::str::from_utf8(&[b'a'; 192]).unwrap();
        for text in ["default/web:http", "", longest] {
            assert_eq!(ServiceName::new(text).unwrap().as_str(), Some(text));
        }
        assert_eq!(ServiceName::new(core::str::from_utf8(&[b'a'; 193]).unwrap()), None);
    }
}

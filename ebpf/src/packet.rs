//! A packet as the programs see it, and one in memory for tests.

#[cfg(not(target_arch = "bpf"))]
use ferroflow_common::csum;
use ferroflow_common::csum::Sum;
use ferroflow_common::verdict::DropReason;
use network_types::eth::EthHdr;

/// Where the IP header starts: every device the programs are attached to is Ethernet.
pub const L3: u32 = EthHdr::LEN as u32;

/// How many bytes [`Reshape::sum`] adds up at the most.
pub const SUM_MAX: u32 = 128;

/// How a change enters a transport checksum: new words minus old ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L4Change {
    /// Of addresses, which the pseudo-header covers.
    Addresses {
        addresses: Sum,
        /// A checksum of zero means there is none and it stays so (UDP over IPv4, RFC 768).
        zero_is_none: bool,
        /// The IP header has no checksum of its own, so changing an address does not cancel out in a sum over the
        /// whole packet.
        l3_unsummed: bool,
    },
    /// Of ports, which are in the transport header itself.
    Ports { ports: Sum, zero_is_none: bool },
}

/// Reads and rewrites a packet. Offsets are from the Ethernet header.
///
/// Checksums have methods of their own because an skb may carry a partial one that its device completes later
/// (`CHECKSUM_PARTIAL`) or a sum over everything (`CHECKSUM_COMPLETE`): storing bytes would corrupt both.
pub trait Packet {
    /// Length in bytes from the Ethernet header on.
    fn length(&self) -> u32;

    /// The packet's EtherType.
    fn ethertype(&self) -> u16;

    /// The same number, of which the verifier knows nothing any more. Where paths meet that found it differently (each
    /// number of extension headers is one), it then follows what comes after once and not once a path.
    fn forget(&self, number: u32) -> u32;

    /// 32-bit words in memory order, `None` where the packet ends before. Words and not bytes, because a word stays in
    /// one register: `u32::to_ne_bytes` takes it apart where a byte is wanted.
    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]>;

    /// # Errors
    /// [`DropReason::Rewrite`] where the packet ends before or cannot be made writable.
    fn write<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), DropReason>;

    /// Brings the IPv4 header checksum at `offset` in line with a change of header words.
    ///
    /// # Errors
    /// [`DropReason::Rewrite`] as for [`Packet::write`].
    fn change_l3_checksum(&mut self, offset: u32, change: Sum) -> Result<(), DropReason>;

    /// Brings the transport checksum at `offset` in line with a change of addresses and ports.
    ///
    /// # Errors
    /// [`DropReason::Rewrite`] as for [`Packet::write`].
    fn change_l4_checksum(&mut self, offset: u32, change: &L4Change) -> Result<(), DropReason>;
}

/// A packet that can be turned into another, longer or shorter one.
pub trait Reshape: Packet {
    /// The checksum's sum over `length` bytes at `offset`; `None` where the packet ends before, or `length` is over
    /// [`SUM_MAX`] or not a multiple of four.
    fn sum(&self, offset: u32, length: u32) -> Option<Sum>;

    /// Cuts or extends the packet at its end.
    ///
    /// # Errors
    /// [`DropReason::Reject`] where the kernel refuses.
    fn resize(&mut self, length: u32) -> Result<(), DropReason>;

    /// Inserts `bytes` bytes of anything between the Ethernet and the IP header.
    ///
    /// # Errors
    /// [`DropReason::Reject`] where the kernel refuses.
    fn make_room(&mut self, bytes: u32) -> Result<(), DropReason>;
}

/// A packet in memory, with complete checksums as on the wire.
#[cfg(not(target_arch = "bpf"))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

#[cfg(not(target_arch = "bpf"))]
impl Bytes {
    fn change(&mut self, offset: u32, change: Sum) -> Result<(), DropReason> {
        let old = self.bytes::<2>(offset).ok_or(DropReason::Rewrite)?;
        self.write(offset, &change.update(old))
    }

    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.0.get(offset as usize..)?.first_chunk::<N>().copied()
    }
}

#[cfg(not(target_arch = "bpf"))]
impl Packet for Bytes {
    fn length(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    fn ethertype(&self) -> u16 {
        self.bytes(12).map_or(0, u16::from_be_bytes)
    }

    fn forget(&self, number: u32) -> u32 {
        number
    }

    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let bytes = self.0.get(offset as usize..)?.get(..N * 4)?;
        let (words, _rest) = bytes.as_chunks::<4>();
        Some(std::array::from_fn(|index| u32::from_ne_bytes(words[index])))
    }

    fn write<const N: usize>(&mut self, offset: u32, bytes: &[u8; N]) -> Result<(), DropReason> {
        let rest = self.0.get_mut(offset as usize..).ok_or(DropReason::Rewrite)?;
        *rest.first_chunk_mut::<N>().ok_or(DropReason::Rewrite)? = *bytes;
        Ok(())
    }

    fn change_l3_checksum(&mut self, offset: u32, change: Sum) -> Result<(), DropReason> {
        self.change(offset, change)
    }

    fn change_l4_checksum(&mut self, offset: u32, change: &L4Change) -> Result<(), DropReason> {
        let (L4Change::Addresses { addresses: sum, zero_is_none, .. }
        | L4Change::Ports { ports: sum, zero_is_none }) = *change;
        if zero_is_none && self.bytes(offset) == Some([0, 0]) {
            return Ok(());
        }
        self.change(offset, sum)?;
        if zero_is_none && self.bytes(offset) == Some([0, 0]) {
            self.write(offset, &[0xff, 0xff])?;
        }
        Ok(())
    }
}

#[cfg(not(target_arch = "bpf"))]
impl Reshape for Bytes {
    fn sum(&self, offset: u32, length: u32) -> Option<Sum> {
        let bytes = self.0.get(offset as usize..)?.get(..length as usize)?;
        (length <= SUM_MAX && length.is_multiple_of(4)).then(|| csum::bytes(bytes))
    }

    fn resize(&mut self, length: u32) -> Result<(), DropReason> {
        self.0.resize(length as usize, 0);
        Ok(())
    }

    fn make_room(&mut self, bytes: u32) -> Result<(), DropReason> {
        let at = L3 as usize;
        if self.0.len() < at {
            return Err(DropReason::Reject);
        }
        self.0.splice(at..at, std::iter::repeat_n(0, bytes as usize));
        Ok(())
    }
}

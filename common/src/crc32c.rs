//! What a change of an SCTP packet's ports does to its checksum, without reading the packet.
//!
//! SCTP carries a CRC32c over the whole packet and no pseudo-header (RFC 9260 section 6.8 and appendix A). A CRC is
//! linear: the checksums of two packets of one length differ by the CRC, begun with zero, of where the packets differ.
//! The ports are the first word, so that difference is one word `d` and then zeros, and the CRC of it is
//! `d * x^(8 * length)` modulo the polynomial. The length is taken four bits at a time and so is the word, and every
//! product of two such parts is in a table of 32 KiB: a packet of any size costs 32 reads. (Multiplying bit by bit
//! needs no table, but 2,000 instructions a packet, and 10,000 of the verifier's.)

/// CRC-32C (Castagnoli), the lowest bit first.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// The polynomial 1: the highest bit is the power zero.
const ONE: u32 = 1 << 31;

/// `SHIFTED[i][j][k][v]` is `v * 16^k`, as a polynomial, times `x^(8 * j * 16^i)`.
static SHIFTED: [[[[u32; 16]; 8]; 16]; 4] = shifted();

const fn shifted() -> [[[[u32; 16]; 8]; 16]; 4] {
    let mut table = [[[[0; 16]; 8]; 16]; 4];
    let mut step = ONE >> 8;
    let mut i = 0;
    while i < 4 {
        let mut power = ONE;
        let mut j = 0;
        while j < 16 {
            table[i][j] = products(power);
            power = multiply(power, step);
            j += 1;
        }
        step = power;
        i += 1;
    }
    table
}

/// `[k][v]` is `v * 16^k` times the power.
const fn products(power: u32) -> [[u32; 16]; 8] {
    let mut products = [[0; 16]; 8];
    let mut k = 0;
    while k < 8 {
        let mut v = 1;
        while v < 16 {
            let rest = v & (v - 1);
            let lowest = (v ^ rest) as u32;
            products[k][v] = if rest == 0 {
                multiply(lowest << (4 * k), power)
            } else {
                products[k][rest] ^ products[k][v ^ rest]
            };
            v += 1;
        }
        k += 1;
    }
    products
}

/// The product modulo the polynomial.
const fn multiply(mut a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    while a != 0 {
        if a & ONE != 0 {
            product ^= b;
        }
        a <<= 1;
        b = (b >> 1) ^ if b & 1 != 0 { POLYNOMIAL } else { 0 };
    }
    product
}

/// What to exclusive-or to the checksum of a packet of `length` bytes, transport header and payload, whose first word
/// becomes another: `difference` is the old word exclusive-or the new one, both read in little-endian order, as the
/// checksum is. Lengths are below 64 KiB, as those of IP packets are.
#[inline(always)]
pub fn change(difference: u32, length: u32) -> u32 {
    let (mut word, mut rest) = (difference, length);
    for row in &SHIFTED {
        let products = &row[(rest & 15) as usize];
        let mut product = 0;
        for (k, column) in products.iter().enumerate() {
            product ^= column[(word >> (4 * k) & 15) as usize];
        }
        word = product;
        rest >>= 4;
    }
    word
}

/// The checksum over `parts` one after the other.
pub fn checksum(parts: &[&[u8]]) -> u32 {
    let bytes = parts.iter().copied().flatten();
    !bytes.fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_the_polynomial() {
        assert_eq!(checksum(&[b"1234", b"56789"]), 0xe306_9283);
        assert_eq!(checksum(&[&[0; 32]]), 0x8a91_36aa, "RFC 3720 appendix B.4");
    }

    #[test]
    fn a_change_of_the_first_word_equals_a_full_computation() {
        let mut data = [0u8; 70_000];
        let mut seed = 3u32;
        for byte in &mut data {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = (seed >> 24) as u8;
        }
        for length in (4..300).chain([576, 1_480, 9_000, 65_515, 65_535]) {
            let (old, rest) = data[..length].split_at(4);
            for new in [[0; 4], [0xff; 4], [old[3], old[0], old[1], old[2]]] {
                let word = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                let changed = checksum(&[old, rest]) ^ change(word(old) ^ word(&new), length as u32);
                assert_eq!(changed, checksum(&[&new, rest]), "{length} bytes");
            }
        }
    }
}

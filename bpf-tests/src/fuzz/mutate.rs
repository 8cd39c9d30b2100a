//! Small damage to bytes.

use ferroflow_ebpf::noise::Noise;

/// What a byte becomes often: ends of ranges, and what headers say of lengths.
const EDGES: [u8; 9] = [0, 1, 4, 6, 17, 0x45, 0x7f, 0x80, 0xff];

/// Changes some places; never gives less than `least` bytes.
pub(super) fn mutate(noise: &mut Noise, bytes: &[u8], other: &[u8], least: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..1 + noise.below(4) {
        let at = noise.below(bytes.len());
        match noise.below(8) {
            0 => bytes[at] ^= 1 << noise.below(8),
            1 => bytes[at] = noise.number() as u8,
            2 => bytes[at] = noise.pick(&EDGES),
            3 => bytes.truncate(at.max(least)),
            4 => {
                let count = 1 + noise.below(40);
                bytes.extend(noise.bytes(count));
            }
            5 => _ = bytes.remove(at),
            6 => {
                let piece = bytes[at..bytes.len().min(at + 1 + noise.below(16))].to_vec();
                let to = noise.below(bytes.len());
                bytes.splice(to..to, piece);
            }
            // The beginning of one and the end of another.
            _ => {
                bytes.truncate(at);
                bytes.extend(&other[at.min(other.len())..]);
            }
        }
        bytes.resize(bytes.len().max(least), 0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mutated_is_long_enough_and_mostly_another() {
        let (mut noise, bytes) = (Noise(3), [7; 60]);
        let changed = (0..1_000).filter(|_| {
            let other = mutate(&mut noise, &bytes, &[9; 30], 54);
            assert!(other.len() >= 54);
            other != bytes
        });
        assert!(changed.count() > 900);
    }
}

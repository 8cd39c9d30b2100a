//! What a datagram socket remembers of the services that it sends to. Rows go from the one that was used last backwards:
//! where two services share a backend, its answers come from the service that was asked last.

use ferroflow_common::abi::socket::{Translation, Translations};
use ferroflow_common::addr::{Addr, Port};

use crate::socket::{self, Peer};

const ROWS: usize = Translations::ROWS;

/// What the socket remembers of the peer that it names.
#[inline(always)]
pub fn known(memory: &Translations, peer: &Peer) -> Option<Translation> {
    let index = find(memory, |row| row.frontend == peer.addr && row.frontend_port == peer.port)?;
    Some(memory.rows[index % ROWS])
}

/// The service that an answer from this address comes from.
#[inline(always)]
pub fn seen(memory: &Translations, addr: Addr, port: Port) -> Option<(Addr, Port)> {
    let index = find(memory, |row| socket::is_backend(row, addr, port))?;
    let row = &memory.rows[index % ROWS];
    Some((row.frontend, row.frontend_port))
}

/// Remembers where the socket goes; what it knew of the same service is replaced.
#[inline(always)]
pub fn keep(memory: &mut Translations, new: &Translation) {
    let known = find(memory, |row| row.frontend == new.frontend && row.frontend_port == new.frontend_port);
    let next = (memory.last as usize).wrapping_add(1);
    let index = known.unwrap_or(next) % ROWS;
    memory.last = index as u32;
    memory.rows[index] = *new;
}

/// The socket named this address itself: answers from there come from there.
#[inline(always)]
pub fn forget(memory: &mut Translations, addr: Addr, port: Port) {
    for row in &mut memory.rows {
        if socket::is_backend(row, addr, port) {
            row.index = 0;
        }
    }
}

#[inline(always)]
fn find(memory: &Translations, is: impl Fn(&Translation) -> bool) -> Option<usize> {
    for age in 0..ROWS {
        let index = (memory.last as usize).wrapping_sub(age) % ROWS;
        let row = &memory.rows[index];
        if row.index != 0 && is(row) {
            return Some(index);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use ferroflow_common::addr::Proto;

    use super::*;

    const POD: Addr = Addr::v4([10, 244, 1, 2]);
    const DNS: Port = Port::new(53);

    fn vip(number: u8) -> Addr {
        Addr::v4([10, 96, 0, number])
    }

    fn peer(number: u8) -> Peer {
        Peer { addr: vip(number), port: DNS, proto: Proto::UDP }
    }

    fn translation(number: u8, backend: Addr) -> Translation {
        Translation {
            frontend: vip(number),
            backend,
            frontend_port: DNS,
            backend_port: DNS,
            index: number.into(),
            generation: 1,
        }
    }

    fn empty() -> Translations {
        let none = Translation {
            frontend: Addr::UNSPECIFIED,
            backend: Addr::UNSPECIFIED,
            frontend_port: Port::ZERO,
            backend_port: Port::ZERO,
            index: 0,
            generation: 0,
        };
        Translations { last: 0, rows: [none; ROWS] }
    }

    #[test]
    fn nothing_is_known_at_first() {
        let nobody = Peer { addr: Addr::UNSPECIFIED, port: Port::ZERO, proto: Proto::UDP };
        assert_eq!(known(&empty(), &nobody), None);
        assert_eq!(seen(&empty(), Addr::UNSPECIFIED, Port::ZERO), None);
    }

    #[test]
    fn four_services_at_once_and_the_fifth_takes_a_place() {
        let mut memory = empty();
        for number in 1..=4 {
            keep(&mut memory, &translation(number, Addr::v4([10, 244, 1, number])));
        }
        for number in 1..=4 {
            assert_eq!(known(&memory, &peer(number)).unwrap().index, number.into());
            let answer = seen(&memory, Addr::v4([10, 244, 1, number]), DNS);
            assert_eq!(answer, Some((vip(number), DNS)));
        }
        keep(&mut memory, &translation(5, POD));
        let remembered = (1..=5).filter(|number| known(&memory, &peer(*number)).is_some());
        assert_eq!(remembered.collect::<Vec<_>>(), [2, 3, 4, 5]);
    }

    #[test]
    fn of_two_services_on_one_backend_the_last_that_was_asked_answers() {
        let mut memory = empty();
        for asked in [1, 2, 1, 1, 2] {
            keep(&mut memory, &translation(asked, POD));
            assert_eq!(seen(&memory, POD, DNS), Some((vip(asked), DNS)), "{asked}");
        }
        assert_eq!(memory.rows.iter().filter(|row| row.index != 0).count(), 2, "each has one row");
    }

    #[test]
    fn another_backend_of_a_service_takes_the_place_of_the_first() {
        let mut memory = empty();
        let other = Addr::v4([10, 244, 2, 2]);
        keep(&mut memory, &translation(1, POD));
        keep(&mut memory, &translation(2, POD));
        keep(&mut memory, &translation(1, other));
        assert_eq!(known(&memory, &peer(1)).unwrap().backend, other);
        assert_eq!(seen(&memory, POD, DNS), Some((vip(2), DNS)));
    }

    #[test]
    fn a_backend_that_is_named_itself_answers_as_itself() {
        let mut memory = empty();
        keep(&mut memory, &translation(1, POD));
        keep(&mut memory, &translation(2, POD));
        forget(&mut memory, POD, Port::new(54));
        assert_eq!(seen(&memory, POD, DNS), Some((vip(2), DNS)), "another port is another peer");
        forget(&mut memory, POD, DNS);
        assert_eq!(seen(&memory, POD, DNS), None);
    }
}

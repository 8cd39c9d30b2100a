//! The maps as the datapath sees them, and ordinary ones for tests.

use core::ops::Deref;

use ferroflow_common::abi::conntrack::{Entry, Tuple};
use ferroflow_common::abi::endpoint::Endpoint;
use ferroflow_common::abi::lb::{Backend, Frontend, FrontendKey};
use ferroflow_common::addr::Addr;
use ferroflow_common::family::Family;

/// A flow's key on the stack. It is bytes and has no alignment of its own; without one the compiler would build it,
/// and take it apart, byte by byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Aligned<T>(pub T);

impl<T> Deref for Aligned<T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        &self.0
    }
}

/// The load-balancing tables.
pub trait Services {
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend>;
    /// `None` past the end of the array.
    fn slot(&self, slot: u32) -> Option<u32>;
    /// `None` past the end of the array; a row that was never used is all zeros.
    fn backend(&self, index: u32) -> Option<Backend>;
}

/// A live entry of the connection table. Two CPUs may write it at once: both write what they saw, each field is one
/// machine word or byte, and a lost update is made again by the next packet.
pub trait Tracked {
    fn load(&self) -> Entry;
    fn store_state(&self, state: u8, expires: u32);
}

/// Why the connection table took no entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InsertError {
    /// The tuple is there already.
    Exists,
    /// The kernel's refusal (rule 36).
    Refused,
}

/// What an insert does where the tuple is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnConflict {
    Fail,
    Replace,
}

/// Everything a packet of one family meets.
pub trait Tables<F: Family>: Services {
    type Tracked: Tracked;

    fn tracked(&self, tuple: &Aligned<Tuple<F::Bytes>>) -> Option<Self::Tracked>;
    /// # Errors
    /// See [`InsertError`].
    fn track(
        &self,
        tuple: &Aligned<Tuple<F::Bytes>>,
        entry: &Entry,
        conflict: OnConflict,
    ) -> Result<(), InsertError>;
    fn untrack(&self, tuple: &Aligned<Tuple<F::Bytes>>);
    fn endpoint(&self, addr: &Addr) -> Option<Endpoint>;
    /// Seconds of `CLOCK_BOOTTIME`.
    fn now(&self) -> u32;
}

#[cfg(test)]
pub(crate) mod fake {
    use std::cell::{Cell, RefCell};
    use std::collections::{BTreeMap, HashMap};
    use std::rc::Rc;

    use ferroflow_common::addr::{Port, Proto};
    use ferroflow_common::family::{V4, V6};

    use super::*;

    /// Ordinary maps behind the trait, filled by tests.
    #[derive(Default)]
    pub(crate) struct Fake {
        pub(crate) frontends: HashMap<FrontendKey, Frontend>,
        pub(crate) slots: Vec<u32>,
        pub(crate) backends: Vec<Backend>,
        pub(crate) endpoints: HashMap<Addr, Endpoint>,
        pub(crate) conntrack: RefCell<BTreeMap<Tuple<[u8; 16]>, Rc<Cell<Entry>>>>,
        pub(crate) clock: Cell<u32>,
        pub(crate) full: Cell<bool>,
    }

    impl Fake {
        /// A service on `addr:port` with these backends, each with its own slot.
        pub(crate) fn service(&mut self, addr: Addr, port: u16, proto: Proto, backends: &[(Addr, u16)]) {
            let service = 1 + self.frontends.len() as u32;
            let offset = self.slots.len() as u32;
            for &(addr, port) in backends {
                if self.backends.is_empty() {
                    self.backends.push(Backend {
                        addr: Addr::UNSPECIFIED,
                        port: Port::ZERO,
                        proto: Proto { number: 0 },
                        flags: 0,
                        generation: 0,
                        service: 0,
                        reserved: 0,
                    });
                }
                self.slots.push(self.backends.len() as u32);
                let port = Port::new(port);
                let flags = Backend::LIVE;
                self.backends.push(Backend { addr, port, proto, flags, generation: 1, service, reserved: 0 });
            }
            let key = FrontendKey { addr, port: Port::new(port), proto, scope: FrontendKey::EXTERNAL };
            let length = backends.len() as u32;
            self.frontends
                .insert(key, Frontend { service, offset, length, flags: Frontend::REJECT, affinity: 0 });
        }

        fn wide<F: Family>(tuple: &Aligned<Tuple<F::Bytes>>) -> Tuple<[u8; 16]> {
            Tuple {
                src: F::addr(tuple.src).bytes,
                dst: F::addr(tuple.dst).bytes,
                src_port: tuple.src_port,
                dst_port: tuple.dst_port,
                proto: tuple.proto,
                reserved: [0; 3],
            }
        }
    }

    impl Tracked for Rc<Cell<Entry>> {
        fn load(&self) -> Entry {
            self.get()
        }

        fn store_state(&self, state: u8, expires: u32) {
            self.set(Entry { state, expires, ..self.get() });
        }
    }

    impl Services for Fake {
        fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
            self.frontends.get(key).copied()
        }

        fn slot(&self, slot: u32) -> Option<u32> {
            self.slots.get(slot as usize).copied()
        }

        fn backend(&self, index: u32) -> Option<Backend> {
            self.backends.get(index as usize).copied()
        }
    }

    macro_rules! tables {
        ($family:ty) => {
            impl Tables<$family> for Fake {
                type Tracked = Rc<Cell<Entry>>;

                fn tracked(
                    &self,
                    tuple: &Aligned<Tuple<<$family as Family>::Bytes>>,
                ) -> Option<Rc<Cell<Entry>>> {
                    self.conntrack.borrow().get(&Self::wide::<$family>(tuple)).cloned()
                }

                fn track(
                    &self,
                    tuple: &Aligned<Tuple<<$family as Family>::Bytes>>,
                    entry: &Entry,
                    conflict: OnConflict,
                ) -> Result<(), InsertError> {
                    let key = Self::wide::<$family>(tuple);
                    if self.full.get() {
                        return Err(InsertError::Refused);
                    }
                    if conflict == OnConflict::Fail && self.conntrack.borrow().contains_key(&key) {
                        return Err(InsertError::Exists);
                    }
                    self.conntrack.borrow_mut().insert(key, Rc::new(Cell::new(*entry)));
                    Ok(())
                }

                fn untrack(&self, tuple: &Aligned<Tuple<<$family as Family>::Bytes>>) {
                    self.conntrack.borrow_mut().remove(&Self::wide::<$family>(tuple));
                }

                fn endpoint(&self, addr: &Addr) -> Option<Endpoint> {
                    self.endpoints.get(addr).copied()
                }

                fn now(&self) -> u32 {
                    self.clock.get()
                }
            }
        };
    }

    tables!(V4);
    tables!(V6);
}

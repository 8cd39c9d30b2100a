//! From the objects of a cluster to packets at a node: the real agent's stages, its tables, the programs in the
//! kernel, and a model that shares nothing with them and says what must happen.
//!
//! ```text
//!             ┌─▶ control (convert, plan, reconcile) ─▶ tables ─▶ node (programs, hook after hook) ─┐ what was seen
//!   case ─────┤                                                                                     ▼
//!  (objects,  └─▶ cluster (the text of the API) ─────────────────────────────────────────────▶ oracle ─▶ judgement
//!   packets)
//!   random makes cases; case shrinks those that go wrong; scenario keeps them as text, and those that people wrote
//! ```
//! [`wire`] builds and reads packets, [`text`] writes them as lines. Neither these nor the oracle use the datapath's
//! code: what both had wrong would be right.

mod barriers;
pub mod case;
pub mod cluster;
pub mod control;
mod exits;
mod flow;
mod isolation;
pub mod node;
pub mod oracle;
mod plain;
pub mod random;
mod refusal;
pub mod scenario;
pub mod tables;
pub mod text;
pub mod wire;

//! How much stack a program needs, read from its instructions: the kernel tells only those whom it refuses.

use std::{collections::BTreeMap, fmt};

use anyhow::{Context as _, Result};
use aya_obj::{Object, generated::bpf_insn};

/// What a chain of calls may use (`MAX_BPF_STACK`).
pub(super) const LIMIT: u32 = 512;
/// Before 6.8 the verifier rounds every frame up to so many bytes, and one that is empty too.
const ROUNDING: u32 = 32;

/// The deepest chain of calls. Displayed: its frames, the program's first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Stack {
    frames: Vec<u32>,
    /// As older kernels add them up.
    pub(super) rounded: u32,
}

impl Stack {
    fn with_caller(mut self, frame: u32) -> Self {
        self.frames.insert(0, frame);
        self.rounded += frame.max(1).next_multiple_of(ROUNDING);
        self
    }
}

impl fmt::Display for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let frames: Vec<_> = self.frames.iter().map(u32::to_string).collect();
        f.pad(&frames.join("+"))
    }
}

pub(super) fn stacks(object: &[u8]) -> Result<BTreeMap<String, Stack>> {
    let mut object = Object::parse(object)?;
    let sections = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_calls(&sections)?;
    let stack = |(name, program): (&String, &aya_obj::Program)| {
        let function = object.functions.get(&program.function_key()).with_context(|| format!("no {name}"))?;
        let code: Vec<_> = function.instructions.iter().map(Instruction::from).collect();
        Ok((name.clone(), deepest(&code, 0)))
    };
    object.programs.iter().map(stack).collect()
}

/// What of an instruction matters here.
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    dst: u8,
    src: u8,
    off: i16,
    imm: i32,
}

impl From<&bpf_insn> for Instruction {
    fn from(insn: &bpf_insn) -> Self {
        let (dst, src) = (insn.dst_reg(), insn.src_reg());
        Self { code: insn.code, dst, src, off: insn.off, imm: insn.imm }
    }
}

const FRAME_POINTER: u8 = 10;
const CALL: u8 = 0x85;
/// `src` of a call within the program.
const PSEUDO_CALL: u8 = 1;
/// `dst = src` and `dst += imm`, 64 bits wide.
const MOVE: u8 = 0xbf;
const ADD: u8 = 0x07;
const EXIT: u8 = 0x95;

impl Instruction {
    fn callee(&self, at: usize) -> Option<usize> {
        (self.code == CALL && self.src == PSEUDO_CALL)
            .then(|| at.checked_add_signed(self.imm as isize + 1))?
    }

    /// How far below the frame pointer a load or store reaches.
    fn reach(&self) -> u32 {
        // Classes 0 to 3 are loads and stores; stores have their base in `dst`.
        let base = match self.code & 7 {
            1 => self.src,
            2 | 3 => self.dst,
            _ => return 0,
        };
        if base == FRAME_POINTER && self.off < 0 { u32::from(self.off.unsigned_abs()) } else { 0 }
    }
}

/// The deepest chain that starts with the function at `start`. Functions stand one after the other, and BPF has no
/// recursion.
fn deepest(code: &[Instruction], start: usize) -> Stack {
    let starts = code.iter().enumerate().filter_map(|(at, instruction)| instruction.callee(at));
    let end = starts.filter(|&other| other > start).min().unwrap_or(code.len());
    let body = code.get(start..end).unwrap_or_default();
    let callees = body.iter().enumerate().filter_map(|(at, instruction)| instruction.callee(start + at));
    let below = callees.map(|callee| deepest(code, callee)).max_by_key(|stack| stack.rounded);
    below.unwrap_or_default().with_caller(frame(body))
}

/// The lowest byte of a function's frame that is loaded, stored or pointed to.
fn frame(body: &[Instruction]) -> u32 {
    // Which registers hold the frame pointer itself.
    let mut pointers = [false; 16];
    let mut lowest = 0;
    for instruction in body {
        let Instruction { code, dst, src, imm, .. } = *instruction;
        lowest = lowest.max(instruction.reach());
        let dst = usize::from(dst);
        match code {
            MOVE => pointers[dst] = src == FRAME_POINTER,
            ADD if pointers[dst] => {
                lowest = lowest.max(if imm < 0 { imm.unsigned_abs() } else { 0 });
                pointers[dst] = false;
            }
            CALL | EXIT => pointers[..6].fill(false),
            _ if matches!(code & 7, 0 | 1 | 4 | 7) => pointers[dst] = false,
            _ => {}
        }
    }
    lowest
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Instruction {
        Instruction { code, dst, src, off, imm }
    }

    #[test]
    fn frames_are_added_up_along_calls() {
        let exit = insn(EXIT, 0, 0, 0, 0);
        let code = [
            // Stores at -8, calls both functions.
            insn(0x7b, FRAME_POINTER, 1, -8, 0),
            insn(CALL, 0, PSEUDO_CALL, 0, 2),
            insn(CALL, 0, PSEUDO_CALL, 0, 5),
            exit,
            // Points to -40.
            insn(MOVE, 2, FRAME_POINTER, 0, 0),
            insn(ADD, 2, 0, 0, -40),
            insn(CALL, 0, 0, 0, 25),
            exit,
            // Loads from -16.
            insn(0x79, 3, FRAME_POINTER, -16, 0),
            exit,
        ];
        let stack = deepest(&code, 0);
        assert_eq!((stack.to_string().as_str(), stack.rounded), ("8+40", 32 + 64));
    }

    #[test]
    fn other_pointers_are_no_frame() {
        let code = [
            insn(0x7b, 6, 1, -300, 0),
            insn(MOVE, 2, FRAME_POINTER, 0, 0),
            insn(MOVE, 2, 6, 0, 0),
            insn(ADD, 2, 0, 0, -300),
        ];
        assert_eq!(deepest(&code, 0).to_string(), "0");
    }
}

//! Which characters are letters, numbers and white space: said by the tokenizer, block by block, when one is met.

/// Code points in a block.
pub const BLOCK: usize = 4096;
/// Blocks of all of Unicode.
const BLOCKS: usize = 0x11_0000 / BLOCK;

/// What the patterns distinguish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// None of the others.
    Other,
    /// `\p{L}`.
    Letter,
    /// `\p{N}`.
    Number,
    /// `\s`.
    Space,
}

/// The classes of the blocks that are known.
#[derive(Debug)]
pub struct Classes {
    blocks: Vec<Option<Box<[Class]>>>,
}

impl Default for Classes {
    fn default() -> Self {
        Self { blocks: vec![None; BLOCKS] }
    }
}

impl Classes {
    /// Learns a block: for each of its code points 0 (other), 1 (letter), 2 (number) or 3 (space).
    ///
    /// # Errors
    /// There is no such block, or not [`BLOCK`] such numbers; says what came.
    pub fn learn(&mut self, block: usize, classes: &[u8]) -> Result<(), String> {
        if block >= BLOCKS || classes.len() != BLOCK {
            return Err(format!("block {block} with {} classes; there are {BLOCKS} of {BLOCK}", classes.len()));
        }
        let read = classes.iter().map(|&class| match class {
            0 => Ok(Class::Other),
            1 => Ok(Class::Letter),
            2 => Ok(Class::Number),
            3 => Ok(Class::Space),
            other => Err(format!("class {other}; allowed are 0 to 3")),
        });
        self.blocks[block] = Some(read.collect::<Result<_, _>>()?);
        Ok(())
    }

    /// The class of a character, or its block if that is not known.
    pub(crate) fn of(&self, character: char) -> Result<Class, usize> {
        let code = character as usize;
        self.blocks[code / BLOCK].as_ref().map(|block| block[code % BLOCK]).ok_or(code / BLOCK)
    }
}

//! The scales of a 4-bit tensor in 8 bit ("double quantization"): their mean is taken off, and what is left is
//! quantized by blocks of 256 to the values of a fixed map.
//!
//! bitsandbytes' CPU backend looks codes up in a table of 65,536 places instead of searching the nearest value, so
//! about one code in a thousand is not the nearest; the same table is made here.
//!
//! # Source
//! bitsandbytes 0.50.2, `functional.create_dynamic_map` and `quantize_blockwise` on a CPU; Dettmers et al. 2022, 8-bit
//! Optimizers via Block-wise Quantization, section 2.

use std::sync::OnceLock;

use crate::cast::{LengthError, check_length};

/// Scales that share a scale of their own.
pub const BLOCK: usize = 256;

/// Places of the table.
const PLACES: usize = 65_536;

/// Quantizes scales.
///
/// # Arguments
/// * `absmax`: n scales.
/// * `offset`: their mean, as the caller computes it.
/// * `codes`: n codes.
/// * `nested_absmax`: the scale of each block of 256.
///
/// # Errors
/// The lengths do not agree.
pub fn quantize(absmax: &[f32], offset: f32, codes: &mut [u8], nested_absmax: &mut [f32]) -> Result<(), LengthError> {
    check_length("nested: codes", codes.len(), Some(absmax.len()))?;
    check_length("nested: absmax", nested_absmax.len(), Some(absmax.len().div_ceil(BLOCK)))?;
    let table = table();
    for ((absmax, codes), scale) in absmax.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(nested_absmax) {
        let mut largest = 0.0_f32;
        for value in absmax {
            largest = largest.max((value - offset).abs());
        }
        *scale = largest;
        if largest == 0.0 {
            codes.fill(0);
            continue;
        }
        let inverse = 1.0 / largest;
        for (value, code) in absmax.iter().zip(codes) {
            let scaled = ((value - offset) * inverse).clamp(-1.0, 1.0);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 0 and 65535; a NaN is 0"
            )]
            let place = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5) as u16;
            *code = table[usize::from(place)];
        }
    }
    Ok(())
}

/// The way back: `map[code] * scale + offset`, each step rounded to f32.
///
/// # Errors
/// The lengths do not agree.
pub fn dequantize(codes: &[u8], nested_absmax: &[f32], offset: f32, absmax: &mut [f32]) -> Result<(), LengthError> {
    check_length("nested: absmax", absmax.len(), Some(codes.len()))?;
    check_length("nested: scales", nested_absmax.len(), Some(codes.len().div_ceil(BLOCK)))?;
    for ((codes, scale), absmax) in codes.chunks(BLOCK).zip(nested_absmax).zip(absmax.chunks_mut(BLOCK)) {
        for (code, value) in codes.iter().zip(absmax) {
            *value = MAP[usize::from(*code)] * scale + offset;
        }
    }
    Ok(())
}

/// For each place between -1 and 1 the number of values of the map whose upper neighbour is nearer.
fn table() -> &'static [u8] {
    static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = vec![0; PLACES];
        let mut code = 0;
        for (place, entry) in table.iter_mut().enumerate() {
            #[expect(clippy::cast_precision_loss, reason = "places are below 2^24")]
            let value = -1.0 + (2.0 * place as f32) / 65535.0;
            while code < MAP.len() - 1 && 0.5 * (MAP[code] + MAP[code + 1]) < value {
                code += 1;
            }
            #[expect(clippy::cast_possible_truncation, reason = "the map has 256 values")]
            let found = code as u8;
            *entry = found;
        }
        table
    })
}

/// The 256 values of the signed dynamic map, ascending.
pub const MAP: [f32; 256] = super::from_bits([
    0xBF7E_3333,
    0xBF7A_999A,
    0xBF77_0000,
    0xBF73_6666,
    0xBF6F_CCCD,
    0xBF6C_3333,
    0xBF68_999A,
    0xBF65_0000,
    0xBF61_6666,
    0xBF5D_CCCD,
    0xBF5A_3333,
    0xBF56_999A,
    0xBF53_0000,
    0xBF4F_6666,
    0xBF4B_CCCD,
    0xBF48_3333,
    0xBF44_999A,
    0xBF41_0000,
    0xBF3D_6666,
    0xBF39_CCCD,
    0xBF36_3334,
    0xBF32_999A,
    0xBF2F_0000,
    0xBF2B_6666,
    0xBF27_CCCD,
    0xBF24_3334,
    0xBF20_999A,
    0xBF1D_0000,
    0xBF19_6666,
    0xBF15_CCCD,
    0xBF12_3334,
    0xBF0E_999A,
    0xBF0B_0000,
    0xBF07_6666,
    0xBF03_CCCC,
    0xBF00_3333,
    0xBEF9_3332,
    0xBEF2_0000,
    0xBEEA_CCCC,
    0xBEE3_999A,
    0xBEDC_6666,
    0xBED5_3333,
    0xBECE_0000,
    0xBEC6_CCCC,
    0xBEBF_999A,
    0xBEB8_6666,
    0xBEB1_3333,
    0xBEAA_0000,
    0xBEA2_CCCC,
    0xBE9B_999A,
    0xBE94_6666,
    0xBE8D_3334,
    0xBE86_0000,
    0xBE7D_9999,
    0xBE6F_3333,
    0xBE60_CCCD,
    0xBE52_6666,
    0xBE44_0000,
    0xBE35_999A,
    0xBE27_3333,
    0xBE18_CCCD,
    0xBE0A_6666,
    0xBDF8_0000,
    0xBDDB_3334,
    0xBDC9_EB85,
    0xBDC4_28F7,
    0xBDBE_6667,
    0xBDB8_A3D7,
    0xBDB2_E148,
    0xBDAD_1EB8,
    0xBDA7_5C2A,
    0xBDA1_999A,
    0xBD9B_D70A,
    0xBD96_147B,
    0xBD90_51EB,
    0xBD8A_8F5D,
    0xBD84_CCCD,
    0xBD7E_147B,
    0xBD72_8F5D,
    0xBD67_0A3D,
    0xBD5B_851F,
    0xBD50_0000,
    0xBD44_7AE1,
    0xBD38_F5C3,
    0xBD2D_70A3,
    0xBD21_EB85,
    0xBD16_6667,
    0xBD0A_E148,
    0xBCFE_B852,
    0xBCE7_AE15,
    0xBCD0_A3D7,
    0xBCB9_999A,
    0xBCA2_8F5D,
    0xBC8B_851F,
    0xBC68_F5C3,
    0xBC3A_E148,
    0xBC1F_3B64,
    0xBC16_0418,
    0xBC0C_CCCD,
    0xBC03_9581,
    0xBBF4_BC6A,
    0xBBE2_4DD3,
    0xBBCF_DF3B,
    0xBBBD_70A4,
    0xBBAB_020D,
    0xBB98_9374,
    0xBB86_24DD,
    0xBB67_6C8A,
    0xBB42_8F5C,
    0xBB1D_B22D,
    0xBAF1_A9FC,
    0xBAA7_EF9D,
    0xBA77_65FF,
    0xBA59_E83E,
    0xBA3C_6A80,
    0xBA1E_ECC1,
    0xBA01_6F01,
    0xB9C7_E283,
    0xB98C_E705,
    0xB923_D70B,
    0xB8BA_1F4B,
    0xB88A_EFB3,
    0xB837_8034,
    0xB7B2_4206,
    0xB702_05FF,
    0xB65A_1A94,
    0xB513_A3B7,
    0x0000_0000,
    0x3513_A3B7,
    0x365A_1A94,
    0x3702_05FF,
    0x37B2_4206,
    0x3837_8034,
    0x388A_EFB3,
    0x38BA_1F4B,
    0x3923_D70B,
    0x398C_E705,
    0x39C7_E283,
    0x3A01_6F01,
    0x3A1E_ECC1,
    0x3A3C_6A80,
    0x3A59_E83E,
    0x3A77_65FF,
    0x3AA7_EF9D,
    0x3AF1_A9FC,
    0x3B1D_B22D,
    0x3B42_8F5C,
    0x3B67_6C8A,
    0x3B86_24DD,
    0x3B98_9374,
    0x3BAB_020D,
    0x3BBD_70A4,
    0x3BCF_DF3B,
    0x3BE2_4DD3,
    0x3BF4_BC6A,
    0x3C03_9581,
    0x3C0C_CCCD,
    0x3C16_0418,
    0x3C1F_3B64,
    0x3C3A_E148,
    0x3C68_F5C3,
    0x3C8B_851F,
    0x3CA2_8F5D,
    0x3CB9_999A,
    0x3CD0_A3D7,
    0x3CE7_AE15,
    0x3CFE_B852,
    0x3D0A_E148,
    0x3D16_6667,
    0x3D21_EB85,
    0x3D2D_70A3,
    0x3D38_F5C3,
    0x3D44_7AE1,
    0x3D50_0000,
    0x3D5B_851F,
    0x3D67_0A3D,
    0x3D72_8F5D,
    0x3D7E_147B,
    0x3D84_CCCD,
    0x3D8A_8F5D,
    0x3D90_51EB,
    0x3D96_147B,
    0x3D9B_D70A,
    0x3DA1_999A,
    0x3DA7_5C2A,
    0x3DAD_1EB8,
    0x3DB2_E148,
    0x3DB8_A3D7,
    0x3DBE_6667,
    0x3DC4_28F7,
    0x3DC9_EB85,
    0x3DDB_3334,
    0x3DF8_0000,
    0x3E0A_6666,
    0x3E18_CCCD,
    0x3E27_3333,
    0x3E35_999A,
    0x3E44_0000,
    0x3E52_6666,
    0x3E60_CCCD,
    0x3E6F_3333,
    0x3E7D_9999,
    0x3E86_0000,
    0x3E8D_3334,
    0x3E94_6666,
    0x3E9B_999A,
    0x3EA2_CCCC,
    0x3EAA_0000,
    0x3EB1_3333,
    0x3EB8_6666,
    0x3EBF_999A,
    0x3EC6_CCCC,
    0x3ECE_0000,
    0x3ED5_3333,
    0x3EDC_6666,
    0x3EE3_999A,
    0x3EEA_CCCC,
    0x3EF2_0000,
    0x3EF9_3332,
    0x3F00_3333,
    0x3F03_CCCC,
    0x3F07_6666,
    0x3F0B_0000,
    0x3F0E_999A,
    0x3F12_3334,
    0x3F15_CCCD,
    0x3F19_6666,
    0x3F1D_0000,
    0x3F20_999A,
    0x3F24_3334,
    0x3F27_CCCD,
    0x3F2B_6666,
    0x3F2F_0000,
    0x3F32_999A,
    0x3F36_3334,
    0x3F39_CCCD,
    0x3F3D_6666,
    0x3F41_0000,
    0x3F44_999A,
    0x3F48_3333,
    0x3F4B_CCCD,
    0x3F4F_6666,
    0x3F53_0000,
    0x3F56_999A,
    0x3F5A_3333,
    0x3F5D_CCCD,
    0x3F61_6666,
    0x3F65_0000,
    0x3F68_999A,
    0x3F6C_3333,
    0x3F6F_CCCD,
    0x3F73_6666,
    0x3F77_0000,
    0x3F7A_999A,
    0x3F7E_3333,
    0x3F80_0000,
]);

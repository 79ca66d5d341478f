"""What step notebooks call: speech, faces, pictures, sound and video."""
from .. import _front

_HOME = dict(phoneme_table="speech", plot_speech="speech", speak="speech", word_table="speech",
             load_picture="picture", show_picture="picture", annotate="face", annotated_source="face",
             cut_sheet="face", load_landmarks="face", prepare_portrait="face", sample_portrait="face",
             save_png="video", frame_count="talk", frame_strip="talk", load_phonemes="talk", load_rig="talk",
             mouth_track="talk", plot_track="talk", render="talk", show_video="talk", sound_seconds="talk",
             video_name="talk", fitness_picture="fitness", judge_portrait="fitness", CheckReport="quality",
             check_video="quality", contact_sheet="quality", plot_check="quality", sample_inputs="samples",
             sample_text="samples", sample_video="samples", gate_table="gates")
__all__ = list(_HOME)
__getattr__, __dir__ = _front(__name__, _HOME)
